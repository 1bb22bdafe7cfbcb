"""Experiments and runs: train, show, export, generate, report."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from eurollm_jax.cli.arguments import Subcommands, command, experiment_of, one_device, trained_model, with_experiment
from eurollm_jax.errors import UserError


def add(commands: Subcommands) -> None:
    with_experiment(command(commands, "train", _train, "train an experiment, or go on where it stopped"))
    with_experiment(
        command(commands, "show", _show, "print the resolved experiment and what it will read, without training")
    )

    export = command(commands, "export", _export, "write a run's model in Hugging Face format")
    export.add_argument("run", type=Path)
    export.add_argument("out", type=Path)
    export.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--verify", action="store_true", help="reload with transformers and compare")

    generate = command(commands, "generate", _generate, "let a run's model continue a text")
    generate.add_argument("run", type=Path)
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    generate.add_argument("--tokens", type=int, default=100)
    generate.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)

    report = command(commands, "report", _report, "write a run's HTML report and print its table")
    report.add_argument("run", type=Path)


def _train(arguments: argparse.Namespace) -> None:
    from eurollm_jax.training.loop import train

    train(*experiment_of(arguments))


def _show(arguments: argparse.Namespace) -> None:
    from eurollm_jax.data.plan import mixture_plan
    from eurollm_jax.data.plan_tables import mix_tables
    from eurollm_jax.experiment import encode
    from eurollm_jax.model.param import count
    from eurollm_jax.model.transformer import specs
    from eurollm_jax.training.loop import open_inputs

    experiment, docstring = experiment_of(arguments)
    inputs = open_inputs(experiment)
    experiment.schedule.build(experiment.steps)  # refuses here already what does not fit the run
    planned = mixture_plan(experiment.data.mixture, inputs.data.sizes, experiment.total_rows)
    console = Console()
    console.print(docstring, highlight=False, markup=False)
    console.print_json(json.dumps(encode(experiment)))
    console.print(mix_tables(planned)[0])
    if len(planned.stages) > 1:
        console.print(f"Stage by stage: eurollm mix show {arguments.experiment}", soft_wrap=True, highlight=False)
    console.print(inputs.parity.table())
    length = experiment.data.sequence_length
    tokens = sum(source.tokens for source in planned.total)
    parameters, flops = count(specs(experiment.model)), experiment.model.flops_per_token(length)
    console.print(
        f"{parameters:,} parameters; {planned.total_rows:,} rows of {length} tokens, {tokens:,} tokens, "
        f"{flops * tokens:.3g} FLOP"
    )


def _export(arguments: argparse.Namespace) -> int:
    from eurollm_jax.hf.export import export
    from eurollm_jax.hf.verify import require_libraries, verify, verify_table

    samples = arguments.run / "samples.json"
    if arguments.verify:
        require_libraries()
        if (arguments.run / "experiment.json").is_file() and not samples.is_file():
            raise UserError(f"{arguments.run} has no samples.json to verify an export with: let it train to its end.")
    params, config, tokenizer = trained_model(arguments.run)
    export(params, config, tokenizer, arguments.out, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"{arguments.out}: written")
    if not arguments.verify:
        return 0
    texts = [sample["prompt"] for sample in json.loads(samples.read_text())]
    rows = verify(arguments.out, params, config, tokenizer, texts=texts)
    Console().print(verify_table(rows))
    return 0 if all(row.ok for row in rows) else 1


def _generate(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.generate import generate

    params, config, tokenizer = trained_model(arguments.run)
    continuations = generate(
        params,
        config,
        one_device(),
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    console = Console()
    for prompt, continuation in zip(arguments.prompt, continuations, strict=True):
        console.print(f"[bold]{_escaped(prompt)}[/bold]{_escaped(continuation)}", highlight=False, soft_wrap=True)


def _report(arguments: argparse.Namespace) -> None:
    from eurollm_jax.evaluation.report import final_table, write_report

    path = write_report(arguments.run)
    if (arguments.run / "evaluation.json").is_file():
        Console().print(final_table(arguments.run))
    else:
        print(f"{arguments.run} is not evaluated yet; `eurollm train` goes on with it and then evaluates it.")
    print(f"Open {path} in a browser.")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
