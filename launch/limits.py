"""Maximum values of options: far above what works, and below what hangs or fills memory."""

MAX_LOCAL = 1 << 10
"""Processes, or GPUs, of one machine."""
MAX_RANKS = 1 << 20
"""Ranks, nodes and tasks of a job; blocks of a model."""
MAX_STEP = 99_999_999
"""Optimizer steps: the digits of a checkpoint's name."""
MAX_COUNT = 1 << 32
"""Samples, documents and tokens that are counted, not held."""
MAX_TOKENS = 1 << 20
"""Tokens of a text, and texts at a time."""
MAX_SIDE = 1 << 12
"""Pixels of a picture's side, and rank of an adapter."""
MAX_PARTS = 1 << 10
"""Parts of a sample: examples in front of a question, operators, dashes."""
MAX_INTEGER = (1 << 63) - 1
"""Seeds and bytes."""
