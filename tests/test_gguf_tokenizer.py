"""The tokenizer of a GGUF file gives the tokens of the tokenizer that it was made from."""

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from gemma_refactored.errors import UserError
from gemma_refactored.gguf_files import read
from gemma_refactored.gguf_tokenizer import tokenizer_of
from gemma_refactored.model_loading import load
from gemma_refactored.prompt_processing import encode_prompts

from .gguf_checkpoints import LAYOUTS, TEMPLATE, add_tokenizer, byte_level_tokenizer, write_pair

TEXTS = [
    "How do I paint a bookshelf?", "It's 1984, isn't it?", "  two  spaces\n\n\nand 123456 lines", "café 日本 🙂",
    "Name three<|end|> rivers", "", "'LL 'll x1y22z333",
]  # fmt: skip


def written(path, fill):
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read.__wrapped__(path)


@pytest.mark.parametrize(
    ("pre", "split", "use_regex"),
    [
        ("gpt-2", None, True),
        ("smollm", pre_tokenizers.Digits(individual_digits=True), True),
        ("llama-bpe", pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "isolated"), False),
        ("qwen2", pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "isolated"), False),
    ],
)
def test_tokens_are_those_of_the_original(tmp_path, pre, split, use_regex):
    expected = byte_level_tokenizer(split, use_regex)
    tokenizer = tokenizer_of(written(tmp_path / "t.gguf", lambda writer: add_tokenizer(writer, expected, pre)))
    assert [tokenizer.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ("<s>", "</s>", TEMPLATE)


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_the_loader_changes_nothing_of_it(tmp_path, architecture):
    _, file = write_pair(tmp_path, architecture)
    original, loaded = byte_level_tokenizer(), load(file).tokenizer
    assert [loaded.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert encode_prompts(loaded, TEXTS[:4]) == encode_prompts(original, TEXTS[:4])
    assert loaded.padding_side == "left" and loaded.all_special_ids == original.all_special_ids


def test_llama_3_takes_words_whole(tmp_path):
    """The vocabulary has a word that no merges lead to."""

    def fill(writer, pre):
        original = byte_level_tokenizer()
        add_tokenizer(writer, original, pre)
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[10] = "zebrafish"

    whole = tokenizer_of(written(tmp_path / "a.gguf", lambda writer: fill(writer, "llama-bpe")))
    split = tokenizer_of(written(tmp_path / "b.gguf", lambda writer: fill(writer, "gpt-2")))
    assert whole.encode("zebrafish", add_special_tokens=False) == [10]
    assert len(split.encode("zebrafish", add_special_tokens=False)) > 1


def sentencepiece(writer, space_prefix=None):
    """A vocabulary of SentencePiece's kind: pieces with scores."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    words = ["▁h", "el", "lo", "hel", "▁hel", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "hello", *"▁helowrd"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + words)
    writer.add_token_scores([0.0] * len(pieces) + [-float(i) for i in range(len(words))])
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)


@pytest.mark.parametrize(("space_prefix", "first"), [(None, "▁hello"), (True, "▁hello"), (False, "hello")])
def test_sentencepiece_vocabularies(tmp_path, space_prefix, first):
    tokenizer = tokenizer_of(written(tmp_path / "t.gguf", lambda writer: sentencepiece(writer, space_prefix)))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("hello world é"))
    assert tokens == ["<s>", first, "▁world", "▁", "<0xC3>", "<0xA9>"]


def test_several_chat_templates_keep_their_names(tmp_path):
    def fill(writer):
        add_tokenizer(writer, byte_level_tokenizer())
        writer.add_string("tokenizer.chat_template.tool_use", "T")

    templates = tokenizer_of(written(tmp_path / "t.gguf", fill)).chat_template
    assert templates == {"default": TEMPLATE, "tool_use": "T"}


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda writer: None, "has no tokenizer"),
        (lambda writer: add_tokenizer(writer, byte_level_tokenizer(), "nobody"), "tokenizer.ggml.pre = 'nobody'"),
        (lambda writer: add_tokenizer(writer, byte_level_tokenizer(), "default"), "tokenizer.ggml.pre = 'default'"),
        (lambda writer: (writer.add_tokenizer_model("bert"), writer.add_token_list(["a"])), "of the kind 'bert'"),
        (
            lambda writer: (
                writer.add_tokenizer_model("llama"),
                writer.add_token_list(["a"]),
                writer.add_eos_token_id(9),
            ),
            "eos_token_id = 9 is no token's number",
        ),
        (
            lambda writer: (writer.add_tokenizer_model("llama"), writer.add_token_list(["a"])),
            "no tokenizer that transformers can build",
        ),
    ],
)
def test_tokenizers_that_cannot_be_built(tmp_path, fill, message):
    with pytest.raises(UserError, match=message):
        tokenizer_of(written(tmp_path / "t.gguf", fill))
