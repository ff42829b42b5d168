import subprocess

import pytest
from fakes import SPEC, fake_run, write_spec

from hap.harness.spec.spec import load_spec
from hap.harness.verdicts.families import NONE, regrouped

OLD = SPEC.replace('family = "sizes"\n', "").replace('family = "sanity"\n', "").replace('over = "seeds"\n', "")


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def at(tmp_path):
    """A repository in which a spec is committed; gives the records that were made at that commit."""
    git(tmp_path, "init", "-q")

    def commit(text):
        path = write_spec(tmp_path, text)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", "a spec")
        made = git(tmp_path, "rev-parse", "HEAD")
        return path, [fake_run(load_spec(write_spec(tmp_path)).cases["hap"], 0, code={"commit": made, "dirty": False})]

    return commit


def test_the_families_of_today_are_those_of_then(at):
    path, records = at(SPEC)
    assert regrouped(path, load_spec(path), records) == ([], [])


def test_a_claim_of_another_family_is_told_with_both_and_the_commit(at):
    path, records = at(SPEC)
    path.write_text(SPEC.replace('family = "sanity"', 'family = "ideas"'))
    (moved,), unknown = regrouped(path, load_spec(path), records)
    assert (moved.number, moved.before, moved.now) == (2, "sanity", "ideas")
    assert (moved.commit, unknown) == (records[0].code["commit"], [])


def test_before_families_were_declared_all_comparisons_were_one(at):
    path, records = at(OLD)
    path.write_text(SPEC)
    (moved,), _ = regrouped(path, load_spec(path), records)
    assert (moved.number, moved.before) == (2, NONE)  # the first compares nothing, and is corrected for nothing


def test_a_claim_that_was_not_there_has_no_family_to_keep(at):
    path, records = at(SPEC)
    path.write_text(SPEC.replace("value = 0\n", "value = 1\n").replace('family = "sanity"', 'family = "ideas"'))
    assert regrouped(path, load_spec(path), records).moved == []


@pytest.mark.parametrize("commit", ["0" * 40, "abc", "--output=x", None])
def test_where_git_has_no_commit_nothing_is_known(at, commit):
    path, _ = at(SPEC)
    path.write_text(SPEC.replace('family = "sanity"', 'family = "ideas"'))
    old = [fake_run(load_spec(path).cases["hap"], 0, code={"commit": commit, "dirty": False})]
    assert regrouped(path, load_spec(path), old) == ([], [commit] if commit else [])


def test_a_spec_that_was_elsewhere_is_not_known(at, tmp_path):
    _, records = at(SPEC)
    other = write_spec(tmp_path, SPEC, "other")
    assert regrouped(other, load_spec(other), records).unknown == [records[0].code["commit"]]
