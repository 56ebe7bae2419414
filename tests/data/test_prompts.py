"""Prompt files, and which prompts an iteration takes:
every pass over the file shows every prompt once, whatever ran before (issue 2).
"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgrove.data.prompts import prompts_of_iteration, prompts_of_run, read_prompts
from planner_cases import user_error
from subprocesses import python

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.integers(1, 12)
COUNTS = st.integers(1, 30)


def numbered(length):
    return [f"prompt {number}" for number in range(length)]


def stream(prompts, iterations, count, seed):
    return [
        prompt for iteration in range(iterations) for prompt in prompts_of_iteration(prompts, iteration, count, seed)
    ]


# Files


def test_lines_are_prompts_in_their_order(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\nein grüner Kreis ○\na red circle\n", encoding="utf-8")
    assert read_prompts(path, "data.prompts") == ["a red circle", "ein grüner Kreis ○", "a red circle"]


@pytest.mark.parametrize("text", ["\n\na\n\n  \n\tb\n\n", "a\nb", "a\r\nb\r\n", "  a  \r\n \r\nb\t\n"])
def test_blank_lines_and_surrounding_space_do_not_count(tmp_path, text):
    path = tmp_path / "p.txt"
    path.write_bytes(text.encode())
    assert read_prompts(path, "data.prompts") == ["a", "b"]


@pytest.mark.parametrize("key", ["data.prompts", "data.eval_prompts", "--prompts"])
def test_a_file_that_is_not_there_is_an_error_that_names_file_and_key(tmp_path, key):
    text = user_error(read_prompts, tmp_path / "gone.txt", key)
    assert key in text
    assert "gone.txt" in text


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_file_without_a_prompt_is_an_error(tmp_path, content):
    path = tmp_path / "bare.txt"
    path.write_bytes(content)
    text = user_error(read_prompts, path, "data.prompts")
    assert "data.prompts" in text
    assert "bare.txt" in text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf8_is_an_error(tmp_path, encoding):
    path = tmp_path / "old.txt"
    path.write_bytes("ein grüner Kreis\n".encode(encoding))
    text = user_error(read_prompts, path, "data.prompts")
    assert "UTF-8" in text
    assert "old.txt" in text


def test_a_folder_is_no_prompt_file(tmp_path):
    assert "data.prompts" in user_error(read_prompts, tmp_path, "data.prompts")


# Which prompts an iteration takes


@given(length=LENGTHS, count=COUNTS, iterations=st.integers(1, 6), seed=SEEDS)
def test_every_pass_over_the_file_is_a_permutation_and_passes_follow_without_a_gap(length, count, iterations, seed):
    prompts = numbered(length)
    taken = stream(prompts, iterations, count, seed)
    assert len(taken) == iterations * count
    for start in range(0, len(taken), length):
        part = taken[start : start + length]
        assert len(set(part)) == len(part)
        assert set(part) <= set(prompts)
        if len(part) == length:
            assert sorted(part) == sorted(prompts)


@given(length=LENGTHS, count=COUNTS, iterations=st.integers(1, 6), seed=SEEDS)
def test_the_prompts_of_a_run_are_those_of_its_iterations_in_the_order_of_first_use(length, count, iterations, seed):
    prompts = numbered(length)
    assert prompts_of_run(prompts, iterations, count, seed) == list(
        dict.fromkeys(stream(prompts, iterations, count, seed))
    )


def test_the_prompts_of_the_longest_run_take_no_time():
    assert len(prompts_of_run(numbered(3), 1_000_000, 100_000, 1)) == 3


@given(length=LENGTHS, seed=SEEDS, counts=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_the_order_does_not_depend_on_how_many_an_iteration_takes(length, seed, counts):
    prompts, (few, many) = numbered(length), counts
    assert stream(prompts, many, few, seed) == stream(prompts, few, many, seed)


@given(length=LENGTHS, count=COUNTS, iteration=st.integers(0, 1000), seed=SEEDS)
def test_an_iteration_is_the_same_whatever_ran_before_it(length, count, iteration, seed):
    prompts = numbered(length)
    fresh = prompts_of_iteration(prompts, iteration, count, seed)
    stream(prompts, 3, 5, seed + 1)
    assert prompts_of_iteration(list(prompts), iteration, count, seed) == fresh
    assert prompts == numbered(length)


def test_a_prompt_that_stands_twice_in_the_file_comes_twice_a_pass():
    assert Counter(prompts_of_iteration(["a", "b", "a"], 4, 3, seed=1)) == {"a": 2, "b": 1}


def test_seeds_and_passes_have_orders_of_their_own():
    prompts = numbered(20)
    orders = {tuple(prompts_of_iteration(prompts, epoch, 20, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


def test_every_prompt_comes_first_equally_often():
    firsts = Counter(prompts_of_iteration(numbered(4), 0, 1, seed)[0] for seed in range(2000))
    assert len(firsts) == 4
    assert all(400 < times < 600 for times in firsts.values())  # 500 ± 5 standard deviations


def test_the_order_does_not_depend_on_the_process():
    program = (
        "from flowgrove.data.prompts import prompts_of_iteration as take; "
        "print(take([f'prompt {n}' for n in range(30)], 7, 30, 3))"
    )
    outputs = {python("-c", program, env={"PYTHONHASHSEED": hash_seed}).stdout for hash_seed in ("0", "1")}
    assert outputs == {f"{prompts_of_iteration(numbered(30), 7, 30, 3)}\n"}
