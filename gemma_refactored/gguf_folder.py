"""A GGUF file as the checkpoint folder it was made from.

The folder has config.json and a tokenizer, as every other checkpoint has them, and the file itself in place of
.safetensors. So nothing that loads, audits or identifies a model needs to know of GGUF, but for where the weights come
from.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from .gguf_config import config_of
from .gguf_files import WEIGHTS, read
from .gguf_tokenizer import tokenizer_of


def as_folder(path: Path) -> Path:
    """A folder that stands for the file: config.json, tokenizer, and the file as model.gguf; gone with the process.

    Raises:
        UserError: damaged, in parts, or a model of a layout that is not read.
    """
    stat = path.stat()
    return Path(_folder(path.resolve(), stat.st_mtime_ns, stat.st_size).name)


@cache
def _folder(path: Path, _modified: int, _size: int) -> tempfile.TemporaryDirectory:
    read.cache_clear()
    file = read(path)
    config = config_of(file)
    tokenizer = tokenizer_of(file)
    folder = tempfile.TemporaryDirectory(prefix="gguf-")
    (Path(folder.name) / "config.json").write_text(json.dumps(config, indent=1))
    (Path(folder.name) / WEIGHTS).symlink_to(path)
    tokenizer.save_pretrained(folder.name)
    return folder
