"""The tokenizer and chat template in a GGUF file's metadata.

transformers has converters for most of it. They build byte-level tokenizers of all kinds as GPT-2's, so what
`tokenizer.ggml.pre` stands for in llama.cpp (src/llama-vocab.cpp) is put in place here, and a name that nobody knows
is refused: the wrong one gives other token ids without a word.
"""

from __future__ import annotations

from .errors import UserError, shown
from .gguf_files import GGUFFile

# Names that stand for GPT-2's own split, and for the same with every digit by itself.
AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "trillion")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Words that are in the vocabulary are taken whole, whatever the merges say.
WHOLE_WORDS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
)  # fmt: skip
COMPOSES_UNICODE = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2")  # the tokenizers of Qwen do
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TEMPLATE = "tokenizer.chat_template"


def tokenizer_of(file: GGUFFile):
    """A transformers tokenizer.

    Raises:
        UserError: there is none in the file, or not one that can be built.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{file.path} has no tokenizer: it lacks tokenizer.ggml.tokens.")
    special = {}
    for name, theirs in SPECIAL.items():
        number = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise UserError(f"{file.path}: tokenizer.ggml.{theirs}_token_id = {shown(number)} is no token's number.")
        special[name] = None if number is None else tokens[number]
    try:
        backend = _backend(file, tokens)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file.path} has no tokenizer that transformers can build: {reason}") from error
    adds = {
        f"add_{end}_token": bool(file.metadata.get(f"tokenizer.ggml.add_{end}_token", end == "bos" and _adds_bos(file)))
        for end in ("bos", "eos")
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left", **special, **adds
    )
    tokenizer.chat_template = _templates(file)
    return tokenizer


def _adds_bos(file: GGUFFile) -> bool:
    """What llama.cpp does where the file does not say."""
    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    return kind == "llama" or pre in WHOLE_WORDS


def _backend(file: GGUFFile, tokens: list[str]):
    """The tokenizers.Tokenizer."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2"):
        raise UserError(f"{file.path}: tokenizers of the kind {shown(kind)} are not read (llama and gpt2 are).")
    splits = theirs.GGUF_PRE_TOKENIZER_SPLITS
    if kind == "gpt2" and pre not in (*splits, *AS_GPT2, *SINGLE_DIGITS):
        raise UserError(
            f"{file.path}: how its tokenizer splits text (tokenizer.ggml.pre = {shown(pre)}) is not known here, and "
            "another way would give other tokens, so this model is not run."
        )
    keys = {
        "tokenizer_type": kind,
        "pre_tokenizer_type": pre if kind == "gpt2" else None,
        "tokens": tokens,
        **{
            name: file.metadata[f"tokenizer.ggml.{name}"]
            for name in ("scores", "token_type", "merges")
            if f"tokenizer.ggml.{name}" in file.metadata
        },
    }
    backend, _ = theirs.convert_gguf_tokenizer(file.architecture, keys)
    if kind == "llama":
        if file.metadata.get("tokenizer.ggml.add_space_prefix") is False and isinstance(
            backend.pre_tokenizer, pre_tokenizers.Metaspace
        ):
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
        return backend
    if pre in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre in COMPOSES_UNICODE:
        backend.normalizer = normalizers.NFC()
    if pre in WHOLE_WORDS:
        backend.model.ignore_merges = True
    return backend


def _templates(file: GGUFFile) -> str | dict[str, str] | None:
    """The chat template; by name where there are several."""
    default = file.metadata.get(TEMPLATE)
    named = {
        key.removeprefix(f"{TEMPLATE}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{TEMPLATE}.") and isinstance(value, str)
    }
    return {**({"default": default} if default else {}), **named} if named else default
