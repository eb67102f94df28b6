"""Prompts of several messages, from their files to the model and back to people."""

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment_artifacts.activation_set import load_activation_set
from alignment_artifacts.analysis import Settings, project_prompts
from alignment_artifacts.behaviour.refusal import signs
from alignment_artifacts.directions.measurements import subject_of
from alignment_artifacts.pairs import load_pairs, pairs_content, pairs_from_lists, pairs_hash, prompt_groups
from gemma_refactored.chat_template import ChatFormat
from gemma_refactored.conversation import Conversation, as_prompt, readable, request, written
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_json, write_json
from gemma_refactored.main import main
from gemma_refactored.manifest import new_manifest
from gemma_refactored.prompt_processing import Prompt, encode_prompts, load_prompts, prompt_texts

from .test_analysis_script import few_pairs
from .test_chat_template import set_template
from .tiny_checkpoints import write_family

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! What is it?"}]
LAST = {"role": "user", "content": "How do I paint a shelf?"}
TALK = [SYSTEM, *EARLIER, LAST]
TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def talks(system=st.booleans(), turns=st.integers(1, 3)):
    """Lists of at least two messages that end with the user."""

    def build(contents, has_system):
        roles = ["user", "assistant"] * 3
        body = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        return [*([SYSTEM] if has_system or len(body) == 1 else []), *(body if len(body) % 2 else body[:-1] or body)]

    return st.builds(build, st.lists(TEXT, min_size=1, max_size=5), system).filter(lambda talk: len(talk) > 1)


@given(talks())
def test_a_conversation_survives_files_and_copies(talk):
    prompt = as_prompt(talk, "a prompt")
    assert written(prompt) == talk and as_prompt(json.loads(json.dumps(written(prompt))), "again") == prompt
    assert copy.deepcopy(prompt) == pickle.loads(pickle.dumps(prompt)) == prompt
    assert all(message["content"] in prompt for message in talk)
    assert prompt != str(prompt) and str(prompt) != prompt and {prompt, str(prompt)} == {str(prompt), prompt}
    assert len({prompt, str(prompt)}) == 2 and request(prompt) == talk[-1]["content"]
    assert readable(prompt).endswith(talk[-1]["content"]) and readable(prompt) != talk[-1]["content"]


def test_people_read_what_is_asked_and_that_more_came_before():
    assert readable(as_prompt(TALK, "p")) == "[system: Be brief.; 2 messages before] How do I paint a shelf?"
    assert readable(as_prompt([SYSTEM, LAST], "p")) == "[system: Be brief.] How do I paint a shelf?"
    assert readable("Plain") == as_prompt([{"role": "user", "content": "Plain"}], "p") == "Plain"


BAD = {
    "is an empty list": [],
    "ends with the assistant's message": [LAST, EARLIER[1]],
    "ends with the system's message": [SYSTEM],
    "has the role 'tool'": [{"role": "tool", "content": "x"}, LAST],
    "has the role None": [{"role": None, "content": "x"}],
    "before all others": [LAST, SYSTEM, LAST],
    "message 2 must be text that is not empty": [LAST, {"role": "user", "content": " "}],
    "and nothing else": [{**LAST, "name": "x"}],
    "message 1 must be an object": ["How?"],
    "surrogate": [{"role": "user", "content": "\ud800"}],
}


@pytest.mark.parametrize("message", BAD)
def test_a_conversation_that_cannot_be_answered_is_refused_in_prompts_and_pairs(tmp_path, message):
    (tmp_path / "prompts.json").write_text(json.dumps({"g": {"s": [BAD[message]]}}))
    pairs = [{"id": "a", "natural": "How?", "artifact": BAD[message]}]
    (tmp_path / "pairs.json").write_text(json.dumps({"categories": {"c": {"pairs": pairs}}}))
    for read, name in ((load_prompts, "prompts.json"), (load_pairs, "pairs.json")):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            read(tmp_path / name)


def test_layouts_of_prompts_files(tmp_path):
    talk = as_prompt(TALK, "p")
    for name, content in {
        "list.json": json.dumps(["Hi", TALK]),
        "groups.json": json.dumps({"a": "Hi", "b": TALK}),
        "rows.jsonl": "\n".join(json.dumps({"messages": prompt}) for prompt in ("Hi", TALK)),
        "lines.jsonl": "\n".join(map(json.dumps, ("Hi", TALK))),
    }.items():
        (tmp_path / name).write_text(content)
        assert prompt_texts(tmp_path / name) == ["Hi", talk], name
    (tmp_path / "one.json").write_text(json.dumps(TALK))
    with pytest.raises(UserError, match="one conversation"):
        load_prompts(tmp_path / "one.json")
    (tmp_path / "p.csv").write_text("prompt\n" + '"' + json.dumps(TALK).replace('"', '""') + '"')
    assert prompt_texts(tmp_path / "p.csv") == [json.dumps(TALK)]  # text only


def test_the_whole_conversation_is_in_the_hashes(organism, tmp_path):
    other = [{**SYSTEM, "content": "Be kind."}, *TALK[1:]]

    def pairs_of(talk):
        return pairs_from_lists(["Hello"], [talk])

    hashes = {pairs_hash(pairs_of(talk)) for talk in (TALK, other, TALK[1:], str(as_prompt(TALK, "p")))}
    assert len(hashes) == 4
    manifests = [new_manifest({}, {}, [Prompt("g", "s", 1, as_prompt(talk, "p"))]) for talk in (TALK, other)]
    assert manifests[0]["prompts_hash"] != manifests[1]["prompts_hash"]
    assert manifests[0]["prompt_groups"] == {"g": {"s": [TALK]}}
    folders = [subject_of(organism, pairs_of(talk), tmp_path).folder for talk in (TALK[1:], [LAST])]
    assert folders[0] != folders[1]
    path = tmp_path / "pairs.json"
    write_json(path, pairs_content(pairs_of(TALK)))
    assert pairs_hash(load_pairs(path)) == pairs_hash(pairs_of(TALK))


def test_the_template_gets_every_message(organism, caplog):
    (ids,) = organism.encode([as_prompt(TALK[1:], "p")])
    assert organism.tokenizer.decode(ids).count("<start_of_turn>") == 4
    (with_system,) = organism.encode([as_prompt(TALK, "p")])
    assert "Be brief." in organism.tokenizer.decode(with_system) and "no turn for the system" in caplog.text
    merged = ChatFormat(system_prompt="Be kind.")
    (ids,) = encode_prompts(organism.tokenizer, [as_prompt(TALK[1:], "p")], True, merged)
    assert "Be kind." in organism.tokenizer.decode(ids)
    with pytest.raises(UserError, match="system message of its own"):
        encode_prompts(organism.tokenizer, [as_prompt(TALK, "p")], True, merged)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[-1]['content'] }}", "leaves out the message 'Hello'"),
        ("{{ raise_exception('turns!') if messages[0].role == 'user' and messages | length > 1 }}"
         "{% for m in messages %}{{ m.content }}{% endfor %}", "turns!.*other messages"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "no system role"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "leaves out the message"),
    ],
)  # fmt: skip
def test_a_template_that_refuses_or_drops_a_message_is_told(tmp_path, template, message):
    tokenizer = set_template(write_family(tmp_path / "m", "llama"), template)
    talk = TALK if "system" in message else TALK[1:]
    with pytest.raises(UserError, match=message):
        encode_prompts(tokenizer, ["Plain", as_prompt(talk, "p")])


def test_plain_text_has_no_place_for_a_conversation(organism, monkeypatch):
    with pytest.raises(UserError, match="omit --no-chat-mode"):
        organism.encode([as_prompt(TALK, "p")], chat_mode=False)
    monkeypatch.setattr(organism.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="--chat-template FILE"):
        organism.encode([as_prompt(TALK, "p")])


def test_the_judge_looks_at_what_is_asked_not_at_an_earlier_refusal():
    refused = {"role": "assistant", "content": "I can't help with that."}
    talk = as_prompt([LAST, refused, LAST], "p")
    assert signs("I can't help with that.", talk) == signs("I can't help with that.", LAST["content"])


@pytest.fixture(scope="module")
def talks_file(tmp_path_factory):
    """Few pairs of the experiment, each artifact prompt behind an exchange, each natural one as it is."""
    content = few_pairs()
    (root,) = content.values()
    for body in root["categories"].values():
        for pair in body["pairs"]:
            pair["artifact"] = [*EARLIER, {"role": "user", "content": pair["artifact"]}]
    path = tmp_path_factory.mktemp("talks") / "talks.json"
    write_json(path, content)
    return path


def test_collections_of_conversations(talks_file, tmp_path, capsys):
    from alignment_artifacts.default_model import DEFAULT_MODEL

    pairs, prompts, folder = load_pairs(talks_file), tmp_path / "prompts.json", tmp_path / "acts"
    write_json(prompts, prompt_groups(pairs))
    common = ["--model", DEFAULT_MODEL, "--max-tokens", "2", "--output-dir", str(tmp_path / "out")]
    saving = ["--save-activations", "--process-by-group", "--activations-dir", str(folder)]
    assert main([*common, *saving, "-v", "--prompts-file", str(prompts)]) == 0
    assert "> [2 messages before] " in capsys.readouterr().out
    data = load_activation_set(folder, pairs)
    assert not data.excluded and data.has_texts and data.pairs[0].artifact.messages[0] == ("user", "Hello")
    results = read_json(tmp_path / "out" / "results.json", "results")
    assert isinstance(results[0]["prompt"], str) and results[-1]["prompt"][0] == EARLIER[0]
    projected = project_prompts(data, Settings(permutations=10, resamples=10))["pairs"][0]
    assert projected["artifact"].startswith("[2 messages before] ")
    changed = pairs.only(range(len(pairs)))
    changed[0] = type(changed[0])(**{**vars(changed[0]), "artifact": str(changed[0].artifact)})
    assert [one["pair"] for one in load_activation_set(folder, changed).excluded] == [pairs[0].id]
    repeated = tmp_path / "again"
    again = ["--from-manifest", str(folder / "manifest.json"), "--activations-dir", str(repeated)]
    assert main(["--output-dir", str(tmp_path / "out"), "-q", *again]) == 0
    assert np.array_equal(load_activation_set(repeated, pairs).values, data.values)


def test_suppression_of_conversations(library, capsys):
    from alignment_artifacts.edits.options import Setting

    setting = Setting("ablate", 1.0, (4,), "residual", "prompt_end")
    talk = [*EARLIER, {"role": "user", "content": library.pairs[0].artifact}]
    (many,) = library.suppress_many([talk], setting, max_tokens=3)
    one = library.suppress(talk, setting, max_tokens=3)
    assert one.after == many.after and one.prompt == many.prompt == as_prompt(talk, "p")
    assert isinstance(one.prompt, Conversation) and "Hello" in library.load().tokenizer.decode(one.prompt_tokens)
