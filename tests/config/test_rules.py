"""The table of what does not go together: each row fires, each remedy cures, all rows are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from config_pages import (
    read_messages,
    render_reference,
    render_rules,
    render_section_rules,
)
from support.conflicts import EXAMPLES, WALK_EXAMPLES, WORLD_EXAMPLES
from support.drawn import draw_configs

from megarecur.config.load import load_config, read_sections, validate
from megarecur.config.mesh import check_world, world_rules
from megarecur.config.rule import Rule
from megarecur.config.rules import RULES, find_conflicts
from megarecur.config.run import Config
from megarecur.errors import ConfigError, MeshError
from megarecur.launch.configs import load_run_config
from megarecur.plan.rules import walk_rules

QUICKSTART = Path(__file__).resolve().parents[2] / "configs/quickstart.yaml"
ORDER = ("parallel.order", "parallel.pipeline", "parallel.placement", "recurrence")
FIVE = {
    "parallel.pipeline=9": "parallel.pipeline=9 exceeds the number of blocks",
    "train.micro_batch_size=3": "train.micro_batch_size=3 must divide train.global_batch_size=8",
    "parallel.zero_stage=3": "parallel.zero_stage=3 with parallel.pipeline=9",
    "model.shared_feed_forward=true": "model.shared_feed_forward=true with parallel.pipeline=9",
    "data.val=[]": "checkpoint.keep_best=1 needs data.val",
}
"""Overrides that break the quickstart together, and what is said of each."""
BESIDE = ("checkpoint.keep_best=1", "parallel.zero_engine=deepspeed")
"""Overrides that some of them need."""


def refusal(*overrides: str) -> list[str]:
    """Return the messages with which the quickstart is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def name(rule: Rule) -> str:
    return "-".join(rule.keys)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_each_rule_fires_and_its_remedy_cures_it(rule: Rule) -> None:
    broken, cure = EXAMPLES[rule.keys]
    messages = refusal(*broken)
    assert len(messages) == 1, messages
    load_config(QUICKSTART, (*broken, *cure))


def test_each_example_is_of_one_rule() -> None:
    assert sorted(EXAMPLES) == sorted(rule.keys for rule in RULES)
    assert sorted(WALK_EXAMPLES) == sorted(rule.keys for rule in walk_rules(len))
    assert sorted(WORLD_EXAMPLES) == sorted(rule.keys for rule in world_rules(2))


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_messages_name_keys_and_a_remedy(rule: Rule) -> None:
    (message,) = refusal(*EXAMPLES[rule.keys][0])
    reason, _, remedy = message.partition("; ")
    assert remedy and not re.search(r"[{}]", rule.remedy.format_map(Anything()))
    assert rule.keys[0] in message or rule.keys[0].partition(".")[0] in reason
    assert len(rule.keys) > 1
    for key in rule.keys:
        assert key.partition(".")[0] in Config.model_fields, key


class Anything(dict[str, object]):
    """Every key, for templates."""

    def __missing__(self, key: str) -> object:
        return AnyValue()


class AnyValue:
    def __getattr__(self, key: str) -> AnyValue:
        return self

    def __format__(self, spec: str) -> str:
        return "value"


def test_all_conflicts_are_reported_together() -> None:
    overrides = [*FIVE, *BESIDE]
    messages = refusal(*overrides)
    assert len(messages) == 5
    for text in FIVE.values():
        assert any(message.startswith(text) for message in messages), text


def test_other_mistakes_hide_no_conflict() -> None:
    overrides = [*FIVE, *BESIDE]
    known = refusal(*overrides)
    unknown = refusal(*overrides, "model.vocab_sise=3")
    assert set(known) < set(unknown) and len(unknown) == 6
    wrong = refusal(*overrides, "model.dropout=x", "optimizer.lr=-1", "nonsense", "task=3")
    assert set(known) < set(wrong) and len(wrong) == 9
    beside = refusal(*overrides, "train.nonsense=3", "train.steps=x", "data.val=[{path: 3}]")
    assert set(known) - set(beside) == {known[-1]} and len(beside) == 7, "in the same section"


def test_rules_about_unreadable_values_are_left_out() -> None:
    """A wrong value is told once; rules that read it say nothing, the others are evaluated."""
    shared = "model.shared_feed_forward=true"
    assert len(refusal(shared, "parallel.pipeline=2")) == 1
    assert refusal(shared, "parallel.pipeline=two") == [
        "parallel.pipeline='two' is not a whole number; set it to one"
    ]
    piped = (shared, "parallel.pipeline=2")
    messages = refusal(*piped, "recurrence={kind: cycel}", "data.seq_length=x")
    assert len(messages) == 3
    assert any(message.startswith(f"model.{shared[6:]} with") for message in messages)
    messages = refusal("train=null", "data.seq_length=0", *piped)
    assert len(messages) == 3, messages


def test_sections_report_all_of_their_own_problems() -> None:
    messages = refusal("model.num_kv_heads=3", "model.qk_norm_over=all", "model.gate_hidden_size=4")
    assert [message.partition("=")[0] for message in messages] == [
        "model.num_kv_heads",
        "model.qk_norm_over",
        "model.gate_hidden_size",
    ]


def load(*overrides: str, world: int | None = None) -> Config:
    return load_run_config(QUICKSTART, ["model.vocab_size=512", *overrides], world)


@pytest.mark.parametrize("keys", WALK_EXAMPLES, ids="-".join)
def test_rules_about_the_walk_fire_and_are_cured(keys: tuple[str, ...]) -> None:
    """Beside the conflicts of the config alone and those with the number of processes."""
    (rule,) = (rule for rule in walk_rules(len) if rule.keys == keys)
    broken, cure = WALK_EXAMPLES[keys]
    with pytest.raises(ConfigError) as caught:
        load(*broken)
    message = rule.explain(load_config(QUICKSTART, ["model.vocab_size=512", *broken]))
    assert str(caught.value).splitlines()[1:] == [f"  {message}"]
    load(*broken, *cure)
    with pytest.raises(ConfigError) as caught:
        load(*broken, "parallel.zero_stage=3", BESIDE[1], "model.dropout=x", world=3)
    messages = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert [message.split("=")[0].split(":")[0] for message in messages] == [
        "model.dropout",
        "parallel.zero_stage",
        keys[0],
        "3 processes do not divide into replicas of parallel.tensor",
    ]


def test_rules_about_the_walk_presuppose_a_placement() -> None:
    wrong = ("parallel={pipeline: 2, order: zbv, placement: [0]}", "exits={}")
    with pytest.raises(ConfigError) as caught:
        load(*wrong)
    assert "parallel.order" not in str(caught.value)


def test_rules_about_the_walk_wait_for_a_tokenizer() -> None:
    config = load_run_config(QUICKSTART, ["data.tokenizer=missing", *WALK_EXAMPLES[ORDER][0]])
    assert config.parallel.order == "zbv"


@pytest.mark.parametrize("i", range(3))
def test_rules_about_the_world_fire_and_are_cured(i: int) -> None:
    rule = world_rules(2)[i]
    broken, cure = WORLD_EXAMPLES[rule.keys]
    with pytest.raises(MeshError) as caught:
        check_world(load_config(QUICKSTART, broken), 2)
    assert str(caught.value) == rule.explain(load_config(QUICKSTART, broken))
    check_world(load_config(QUICKSTART, (*broken, *cure)), 2)


def test_every_message_ends_in_a_remedy() -> None:
    """Of configs drawn from the schema, many of them with values of a wrong type."""
    names = ("quickstart.yaml", "looped.yaml", "papers/dynamic_halt/listops-gutlb-small.yaml")
    bases = {name: read_sections(QUICKSTART.parent / name) for name in names}
    refused = 0
    for values in draw_configs(bases, {}, 1, 150):
        try:
            validate(values, "drawn")
        except ConfigError as error:
            refused += 1
            for message in str(error).splitlines()[1:]:
                reason, _, remedy = message.partition("; ")
                assert reason.strip() and remedy, message
    assert refused > 20


def test_a_warm_up_that_does_not_fit_names_the_steps_that_it_takes() -> None:
    (message,) = refusal("train.steps=4")
    assert message.endswith(
        "raise train.steps to at least 40, or lower warmup_steps or decay_steps"
    )
    load_config(QUICKSTART, ["train.steps=40"])


def test_a_good_config_breaks_no_rule() -> None:
    assert find_conflicts(load_config(QUICKSTART)) == []


def test_the_page_of_rules_has_every_row() -> None:
    page = render_rules()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(RULES) + len(walk_rules(len)) + len(world_rules(2))
    assert not re.search(r"[{}]", page)


def test_the_page_of_rules_has_the_messages_of_sections() -> None:
    page, messages = render_section_rules(), list(read_messages())
    assert "| `model` | `num_kv_heads` must divide `num_heads`. |" in page
    assert "| `train` | `micro_batch_size` must" in page and "| `recurrence.num_loops` | " in page
    for section, message in messages:
        reason, _, remedy = message.partition("; ")
        assert section and reason and remedy, (section, message)
    yields = sum(
        len(re.findall(r"^ +yield (?!from|schema)", path.read_text(), re.M))
        for path in (QUICKSTART.parents[1] / "megarecur/config").glob("*.py")
        if path.name not in ("locate.py", "load.py")
    )
    assert len(messages) == yields


def test_the_reference_has_every_key_with_a_meaning() -> None:
    page = render_reference()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 6 and cells[4].strip(), row
    for section in Config.model_fields:
        assert f"`{section}`" in page
