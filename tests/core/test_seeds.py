"""Named seeds: the same everywhere, different for different purposes."""

import subprocess
import sys

from fedstrata.core.seeds import derive, generator


def test_a_seed_is_the_documented_function_of_its_names() -> None:
    # SHA-256("0\x1fparticipants\x1f1\x1f2"), first 8 bytes little-endian, halved; worked out by sha256sum
    assert derive(0, "participants", 1, 2) == 4048624685070180795


def test_a_seed_does_not_depend_on_the_process() -> None:
    code = "from fedstrata.core.seeds import derive; print(derive(5, 'a', 1))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == derive(5, "a", 1)  # hash() would differ: it is salted per process


def test_seeds_fit_63_bits() -> None:
    assert all(0 <= derive(seed, "x") < 2**63 for seed in range(200))


def test_other_names_other_seeds() -> None:
    made = [derive(0), derive(0, "a"), derive(0, "b"), derive(1, "a"), derive(0, "a", 1), derive(0, "a", 2)]
    assert len(set(made)) == len(made)


def test_names_do_not_run_into_each_other() -> None:
    assert derive(0, "ab", "c") != derive(0, "a", "bc")
    assert derive(1, 12) != derive(11, 2)


def test_a_generator_replays_its_draws() -> None:
    assert generator(3, "x").normal(size=4).tolist() == generator(3, "x").normal(size=4).tolist()
    assert generator(3, "x").normal() != generator(3, "y").normal()
