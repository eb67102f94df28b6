"""Twins from both layouts."""

import csv
import io
import json

import pytest

from alignment_artifacts.comparison.twins import load_twins, twins_for
from alignment_artifacts.pairs import PAIRS_JSON, Pair, load_pairs
from gemma_refactored.errors import UserError

from .conftest import ROOT

XSTEST = """id,prompt,type,label,focus,note
v2-1,How can I paint a process?,homonyms,safe,paint,
v2-2,"Where can I shoot, say, a photo?",homonyms,safe,shoot,
v2-26,Paint first contrast?,contrast_homonyms,unsafe,paint,
v2-27,Second contrast?,contrast_homonyms,unsafe,shoot,
v2-251,No contrast of its own,nons_group_real_discr,safe,,
v2-276,A shared one,real_group_nons_discr,safe,,
v2-301,Its contrast,contrast_discr,unsafe,,
v2-401,Fictional,privacy_fictional,safe,,
v2-426,Real,contrast_privacy,unsafe,,
"""


def of_pairs(*rows):
    """A file of one category."""
    pairs = [{"id": name, "twin": twin, "artifact": artifact} for name, twin, artifact in rows]
    return {"benign_twins": {"categories": {"c": {"pairs": pairs}}}}


def test_twins_that_share_one_of_two_prompts_are_two(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(of_pairs(("1", "a", "b"), ("2", "a", "c"), ("3", "d", "b"))))
    assert [twin.id for twin in load_twins(tmp_path / "x.json")] == ["1", "2", "3"]


def test_the_organisms_twins():
    twins = load_twins(ROOT / "model_organism" / "benign_twins.json")
    assert len(twins) == 25 and twins[0].id == "tech_twin_1" and twins[0].category == "technical_dangerous"
    pairs = load_pairs(ROOT / "alignment_artifact_prompt_pairs.json")
    used = {text for pair in pairs for text in (pair.natural, pair.artifact)}
    # A direction learnt on the pairs has seen no prompt that it is tested on.
    assert not used & {text for twin in twins for text in (twin.natural, twin.artifact)}


def test_only_the_pairs_they_were_made_for_get_the_shipped_twins(tmp_path):
    pairs, other = load_pairs(PAIRS_JSON), [Pair("1", "a", "Is the sea blue?", "I am sure the sea is blue. Is it?")]
    assert len(twins_for(pairs, None)) == len(twins_for(pairs.only(range(9)), None)) == 25
    assert twins_for(other, None) == twins_for([*pairs, *other], None) == []
    (tmp_path / "xstest.csv").write_text(XSTEST)
    assert len(twins_for(other, tmp_path / "xstest.csv")) == 4


def test_xstest_pairs_each_safe_prompt_with_its_contrast(tmp_path):
    (tmp_path / "xstest.csv").write_text(XSTEST)
    assert load_twins(tmp_path / "xstest.csv") == [
        Pair("v2-1", "homonyms", "How can I paint a process?", "Paint first contrast?"),
        Pair("v2-2", "homonyms", "Where can I shoot, say, a photo?", "Second contrast?"),
        Pair("v2-276", "real_group_nons_discr", "A shared one", "Its contrast"),
        Pair("v2-401", "privacy_fictional", "Fictional", "Real"),
    ]


def test_what_spreadsheets_make_of_it_and_earlier_columns_are_read(tmp_path):
    (tmp_path / "xstest.csv").write_text(XSTEST)
    expected = load_twins(tmp_path / "xstest.csv")
    rows = list(csv.DictReader(io.StringIO(XSTEST)))
    earlier = [{"id_v1": "v1", "id_v2": row.pop("id"), **row} for row in rows]
    for name, newline, separator, encoding in (("X.CSV", "\r\n", ";", "utf-8-sig"), ("x.tsv", "\n", "\t", "utf-16")):
        for without in ((), ("label",)):
            names = [name for name in earlier[0] if name not in without]
            with (tmp_path / name).open("w", newline="", encoding=encoding) as file:
                writer = csv.DictWriter(file, names, delimiter=separator, lineterminator=newline, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(earlier)
            assert load_twins(tmp_path / name) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("id,prompt,type\n1,x,homonyms\n", "has no column 'label'"),
        ("", "holds no twins"),
        ("prompt,type,label\nx,homonyms,safe\n", "has no column 'id'"),
        (XSTEST.replace("Second contrast?,contrast_homonyms,unsafe", "x,contrast_homonyms,safe"), "must be unsafe"),
        (XSTEST.replace("v2-27,Second contrast?,contrast_homonyms,unsafe,shoot,\n", ""), "but 1 contrasts"),
        ("id,prompt,type,label\n1,x,homonyms,safe\n", "holds no twins"),
        (XSTEST + XSTEST.splitlines()[1] + "\n", "the id 'v2-1' occurs twice"),
        (XSTEST + XSTEST.partition("\n")[2], "the id 'v2-1' occurs twice"),
        (XSTEST.replace("v2-27", "v2-26"), "the id 'v2-26' occurs twice"),
        (XSTEST.replace("Second contrast?", "how can I  paint a process?"), "twin 'v2-1' is also an artifact prompt"),
        (XSTEST.replace("Fictional", "Real"), "twin 'v2-401' is also an artifact prompt"),
        (XSTEST + "v2-500,No,homonyms,safe,,\nv2-501,No,contrast_homonyms,unsafe,,\n", "'v2-500' is also an artifact"),
        (
            XSTEST.replace('"Where can I shoot, say, a photo?"', "How can I paint a process?").replace(
                "Second contrast?", "Paint first contrast?"
            ),
            "twin 'v2-2' repeats 'v2-1'",
        ),
        ("id,prompt,type,label\n1,x\n", "must be safe"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        ('id,prompt,type,label\n1,"x,homonyms,safe\n', "cannot be read as CSV"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_twins(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "does not have the layout"),
        ({"benign_twins": {"categories": {"a": {"pairs": [{"id": "1", "twin": "x"}]}}}}, "does not have the layout"),
        ({"benign_twins": {"categories": {"a": {"pairs": [{"id": "1", "twin": "", "artifact": "x"}]}}}}, "needs text"),
        ({"benign_twins": {"categories": {}}}, "holds no twins"),
        (of_pairs(("1", "x", "x")), "twin '1' is also an artifact prompt"),
        (of_pairs(("1", "a", "b"), ("2", "b", "c")), "twin '2' is also an artifact prompt"),
        (of_pairs(("1", "a", "b"), ("1", "a", "b")), "the id '1' occurs twice in 'c'"),
        (of_pairs(("1", "a", "b"), ("1", "c", "d")), "the id '1' occurs twice in 'c'"),
        (of_pairs(("1", "a", "b"), ("2", "a", "b")), "twin '2' repeats '1'"),
    ],
)
def test_a_bad_json_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_twins(tmp_path / "x.json")


def test_no_file(tmp_path):
    for name in ("none.csv", "none.json"):
        with pytest.raises(UserError, match="does not exist"):
            load_twins(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    for name in ("folder.csv", "x" * 300 + ".csv"):
        with pytest.raises(UserError, match="The twins file .* cannot be read"):
            load_twins(tmp_path / name)
