"""The names of the checks, in the order in which they are told."""

LOCAL = (
    "python",
    "dependencies",
    "jax and jaxlib",
    "plug-in",
    "driver",
    "devices free",
    "site's variables",
    "network interfaces",
    "open files",
    "pinned memory",
    "scratch writable",
    "scratch room",
    "scratch renames",
    "scratch locks",
    "scratch clock",
)
OF_PROBE = (  # of every whole examination; some have more of it, which ORDER names
    "import of jax",
    "connection",
    "backend",
    "XLA_FLAGS",
    "devices",
    "device memory",
    "products",
    "attention",
    "all-reduce in a node",
    "all-reduce of all",
)
OF_ALL = ("processes alike", "clocks")  # of several processes
ORDER = (
    *LOCAL,
    *("import of jax", "connection", "probe", "processes there", *OF_ALL, "scratch shared"),
    *("backend", "XLA_FLAGS", "devices", "device kind", "device memory", "products", "attention", "attention by cuDNN"),
    *("all-reduce", "all-reduce in a node", "all-reduce of all"),
)
