"""Prompt files and the chat format."""

import json

import pytest

from gemma_refactored.errors import UserError
from gemma_refactored.prompt_processing import Prompt, encode_prompts, load_prompts, prompt_texts

from .conftest import ROOT


def write(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_prompts_come_in_file_order_with_their_places(tmp_path):
    prompts = load_prompts(write(tmp_path, {"b": {"y": ["one", "two"]}, "a": {"x": ["three"]}}))
    assert prompts == [Prompt("b", "y", 1, "one"), Prompt("b", "y", 2, "two"), Prompt("a", "x", 1, "three")]
    assert str(prompts[1].folder) == "b/y/batch_2"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "null", {}, {"g": []}, {"g": {}}, {"g": {"s": []}}, {"g": {"s": "text"}}, {"g": {"s": [1]}},
     {"g": {"s": ["  "]}}, {"g": {"s": [None]}}, {"..": {"s": ["x"]}}, {"a/b": {"s": ["x"]}}, {"g": {"../s": ["x"]}},
     {"/abs": {"s": ["x"]}}, {"": {"s": ["x"]}}, {"g\u0000": {"s": ["x"]}}, {"g" * 300: {"s": ["x"]}},
     {"g": {"s": ["half \ud800 pair"]}}, {".hidden": {"s": ["x"]}}],
)  # fmt: skip
def test_bad_prompt_files_are_refused_with_their_place(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match="prompts.json"):
        load_prompts(path)


TEXTS = ["How do I paint a naïve; bookshelf?", 'Say "hello", please.']
ROWS = [{"id": i, "prompt": text} for i, text in enumerate(TEXTS)]
AS_CSV = 'id{0}prompt{1}0{0}"How do I paint a naïve; bookshelf?"{1}1{0}"Say ""hello"", please."{1}'


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "\n".join([*TEXTS, "", "  "])),
        ("a.TXT", "\ufeff" + "\r\n\r\n".join(TEXTS)),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"prompts": TEXTS})),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, TEXTS))),
        ("a.csv", AS_CSV.format(",", "\n")),
        ("a.CSV", "\ufeff" + AS_CSV.format(";", "\r\n")),
        ("a.tsv", AS_CSV.format("\t", "\n")),
        ("a.csv", AS_CSV.format(",", "\n").replace("prompt", " Goal ")),
    ],
)
def test_lists_of_prompts_that_people_have(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    expected = [Prompt("prompts", "prompt_list", i, text) for i, text in enumerate(TEXTS, 1)]
    assert load_prompts(tmp_path / name) == expected
    assert prompt_texts(tmp_path / name) == prompt_texts(str(tmp_path / name)) == prompt_texts(TEXTS) == TEXTS


def test_an_object_of_one_level_names_its_prompts(tmp_path):
    prompts = load_prompts(write(tmp_path, {"boats": "one", "cakes": ["two", "three"]}))
    assert prompts == [
        Prompt("boats", "prompt_list", 1, "one"), Prompt("cakes", "prompt_list", 1, "two"),
        Prompt("cakes", "prompt_list", 2, "three"),
    ]  # fmt: skip


def test_the_column_can_be_named(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a.csv").write_text("prompt,goal,note\none,two,three\n")
    assert prompt_texts(tmp_path / "a.csv") == ["one"] and not caplog.text
    assert prompt_texts(tmp_path / "a.csv", "note") == ["three"]
    (tmp_path / "b.csv").write_text("goal,note\ntwo,three\n")
    assert prompt_texts(tmp_path / "b.csv") == ["two"] and "the column 'goal'" in caplog.text


@pytest.mark.parametrize(
    "name, content, column, message",
    [
        ("a.txt", "\n \n", None, "holds no prompts"),
        ("a.txt", b"\xff\x00x", None, "not text in UTF-8"),
        ("a.txt", "one", "prompt", "without columns"),
        ("a.csv", "a,b\n1,2\n", None, "its columns are a, b"),
        ("a.csv", "a,b\n1,2\n", "c", "no column 'c'"),
        ("a.csv", "prompt,b\n,2\n", None, "must be text that is not empty"),
        ("a.csv", "prompt,note\nWell, then,2\n", None, "Row 1 .* double quotes"),
        ("a.csv", "prompt,prompt\n1,2\n", None, "two columns"),
        ("a.csv", 'prompt,b\n"x,2\n', None, "cannot be read as CSV"),
        ("a.jsonl", '"one"\n{', None, "Line 2 of .* not valid JSON"),
        ("a.jsonl", '{"prompt": "one"}\n{"text": "two"}', None, "must be text that is not empty"),
        ("a.json", '{"g": "one"}', "prompt", "no columns"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, name, content, column, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name, column)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_prompts(tmp_path / "none.json")


def test_chat_format_is_gemmas_with_one_bos(organism):
    (ids,) = encode_prompts(organism.tokenizer, ["How do I paint a bookshelf?"])
    text = organism.tokenizer.decode(ids)
    assert text == ("<bos><start_of_turn>user\nHow do I paint a bookshelf?<end_of_turn>\n<start_of_turn>model\n")
    assert ids.count(organism.tokenizer.bos_token_id) == 1


def test_plain_mode_and_prompts_that_bring_their_own_bos(organism):
    tokenizer = organism.tokenizer
    plain, doubled = encode_prompts(tokenizer, ["paint", "<bos><bos>paint"], chat_mode=False)
    assert "<start_of_turn>" not in tokenizer.decode(plain)
    assert doubled.count(tokenizer.bos_token_id) == 1


def test_without_a_chat_template_prompts_are_plain_and_that_is_said(organism, monkeypatch, caplog):
    prompts = ["paint a bookshelf"]
    plain = encode_prompts(organism.tokenizer, prompts, chat_mode=False)
    monkeypatch.setattr(organism.tokenizer, "chat_template", None)
    assert encode_prompts(organism.tokenizer, prompts, chat_mode=True) == plain
    assert "no chat template" in caplog.text


def test_any_text_survives_the_tokenizer(organism):
    for text in ("naïve café – 日本語 🙂", "tab\tand\nnewline", "a" * 1000, "<end_of_turn>"):
        ids = organism.tokenizer.encode(text, add_special_tokens=False)
        assert organism.tokenizer.decode(ids) == text


def test_the_committed_prompts_are_the_experiment():
    from alignment_artifacts.pairs import load_pairs, prompt_groups

    groups = prompt_groups(load_pairs(ROOT / "alignment_artifact_prompt_pairs.json"))
    assert len(groups) == 100
    assert list(groups["natural_technical_dangerous_tech_1"]) == ["prompt_list"]


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('only roles') }}", "{% if %}"]
)
def test_a_chat_template_cannot_do_harm(organism, monkeypatch, template):
    """Templates come with a checkpoint, from anybody; they are rendered in a sandbox."""
    monkeypatch.setattr(organism.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match="chat template cannot be used.*--no-chat-mode"):
        encode_prompts(organism.tokenizer, ["Hello."])


def test_a_prompt_is_text_not_a_template(organism):
    (ids,) = encode_prompts(organism.tokenizer, ["{{ 7 * 6 }}"])
    assert "42" not in organism.tokenizer.decode(ids)
