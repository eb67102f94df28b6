"""What is said of something long where there is no terminal."""

import pytest

from gemma_refactored import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test decides."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_one_line_with_an_estimate(clock, capsys):
    with progress.stage("measuring", 2000, "token") as advance:
        for _ in range(200):
            clock[0] += 0.1
            advance(10)
    assert capsys.readouterr().err == "measuring: 2000 tokens, about 20 seconds\n"


def test_long_work_says_every_half_minute_how_far_it_is(clock, capsys):
    with progress.stage("measuring", 2000, "token") as advance:
        for _ in range(200):
            clock[0] += 0.5
            advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 2000 tokens, about 2 minutes",
        "measuring: 700 of 2000 tokens, about 65 seconds left",
        "measuring: 1300 of 2000 tokens, about 35 seconds left",
        "measuring: 1900 of 2000 tokens, about 5 seconds left",
    ]


def test_work_of_one_piece_is_told_too(clock, capsys):
    with progress.stage("answering", 50, "token") as advance:
        clock[0] += 4
        advance(50)
    assert capsys.readouterr().err == "answering: 50 tokens, about 4 seconds\n"


def test_slow_work_is_estimated_before_a_twentieth_is_done(clock, capsys):
    with progress.stage("reading", 1000, "text") as advance:
        clock[0] += 60
        advance(1)
        assert capsys.readouterr().err == "reading: 1 of 1000 texts after 60 seconds\n"
        clock[0] += 60
        advance(1)
        assert capsys.readouterr().err == "reading: 1000 texts, about 1000 minutes\n"


def test_what_comes_before_the_first_piece_is_not_taken_for_the_speed(clock, capsys):
    with progress.stage("measuring", 960, "token") as advance:
        clock[0] += 13  # 48 prompts are read, and one token of each answer written; from then on it is fast
        advance(48)
        assert capsys.readouterr().err == ""
        clock[0] += 0.5
        advance(48)
    assert capsys.readouterr().err == "measuring: 960 tokens, about 22 seconds\n"


def test_what_an_earlier_run_has_left_says_nothing_about_the_rest(clock, capsys):
    with progress.stage("reading", 1000, "text") as advance:
        advance(500, kept=True)
        clock[0] += 5
        advance(50)
        advance(300, kept=True)
        clock[0] += 5
        advance(50)
    assert capsys.readouterr().err == "reading: 200 texts, about 20 seconds\n"


def test_quiet_says_nothing_and_items_come_through(capsys):
    with progress.stage("measuring", 10, "token", quiet=True) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
    assert list(progress.each("abc", "trying", "setting")) == list("abc")
    assert capsys.readouterr().err.startswith("trying: 3 settings, about 0 seconds")
