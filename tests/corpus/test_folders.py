"""Files that appear whole, or not at all."""

import json
import os

from eurollm_jax.corpus.folders import write_json


def test_a_json_file_is_on_disk_before_it_has_its_name_and_its_name_is_when_it_is_there(tmp_path, monkeypatch):
    """A node that dies soon after a rename would leave a file of length 0 where only the name had reached the disk."""
    path, done = tmp_path / "record.json", []
    sync, rename = os.fsync, os.replace

    def spied_sync(handle):
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), path.exists()))
        sync(handle)

    def spied_rename(source, target):
        done.append(("rename", source.name, json.loads(source.read_text(encoding="utf-8"))))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spied_sync)
    monkeypatch.setattr(os, "replace", spied_rename)
    write_json(path, {"ä": 1})
    partial = ".record.json.partial"
    assert done == [("sync", partial, False), ("rename", partial, {"ä": 1}), ("sync", tmp_path.name, True)]
    assert path.read_text(encoding="utf-8") == '{\n "ä": 1\n}\n'
