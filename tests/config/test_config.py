"""The config: mistakes reported at once, overrides, the resolved YAML, what a resume may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megarecur.config.load import (
    changed_fixed_fields,
    flatten,
    load_config,
    read_sections,
    to_yaml,
    validate,
)
from megarecur.config.run import Config
from megarecur.errors import ConfigError

BASE = """
run_dir: runs/quickstart
model: {hidden_size: 192, num_heads: 4}
recurrence: {kind: reuse_map, reuse_map: [4, 2, 1, 1]}
data: {train: [{path: a}, {path: b, weight: 2}], val: [{path: v}], tokenizer: t, seq_length: 128}
optimizer: {lr: 3.0e-3, schedule: {kind: cosine, warmup_steps: 40}}
train: {steps: 400, global_batch_size: 16, micro_batch_size: 8}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_all_mistakes_are_reported_at_once_with_path_value_and_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    text = BASE.replace("num_heads: 4", "num_heads: 0, hiden_size: 3").replace(
        "steps: 400", "steps: lots"
    )
    path.write_text(text.replace("kind: cosine", "kind: cosin"))
    message = refusal(path, "data.train.1.wieght=3", "nonsense", "optimizer.lr=.inf")
    lines = [line.strip() for line in message.splitlines()]
    assert lines[0] == f"{path}: 7 problems"
    assert set(lines[1:]) == {
        "override 'nonsense' is not of the form key.sub=value; write it as one",
        "model.num_heads=0 is too small; set it above 0",
        "model.hiden_size: unknown key; did you mean 'hidden_size'?",
        "data.train.1.wieght: unknown key; did you mean 'weight'?",
        "optimizer.lr=inf is not finite; set it to a finite number",
        "optimizer.schedule.kind: unknown kind 'cosin'; did you mean 'cosine'?",
        "train.steps='lots' is not a whole number; set it to one",
    }


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (
            "{kind: cycle, num_blocks: x, depth: 4}",
            "recurrence.num_blocks='x' is not a whole number; set it to one",
        ),
        ("{kind: cycle, num_block: 4, depth: 4}", "recurrence.num_block: unknown key; did you me"),
        (
            "{kind: cycle, num_blocks: 4, depth: 3}",
            "recurrence.depth=3 leaves some of num_blocks=4 unused; raise",
        ),
        (
            "{kind: reuse_map, reuse_map: [1, 0]}",
            "recurrence.reuse_map.1=0 is too small; set it above 0",
        ),
        ("{kind: reuse_map}", "recurrence.reuse_map: required, but missing"),
        ("{kind: cycel}", "recurrence.kind: unknown kind 'cycel'; did you mean 'cycle'?"),
        ("{depth: 3}", "recurrence: needs a `kind`"),
        ("{kind: custom, order: [0, 2]}", "recurrence.order never runs block(s) [1]"),
        ("3", "recurrence=3 is not a section; write it as {key: value}"),
    ],
)
def test_paths_are_those_of_the_file_without_the_tag_of_a_union(
    base: Path, section: str, line: str
) -> None:
    message = refusal(base, f"recurrence={section}")
    assert f"\n  {line}" in message
    assert "recurrence.cycle" not in message and "reuse_map.reuse_map" not in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.num_kv_heads=3", "num_kv_heads=3 must divide num_heads=4"),
        ("model.head_dim=25", "head_dim=25 is odd"),
        ("train.micro_batch_size=3", "micro_batch_size=3 must divide train.global_batch_size=16"),
        ("optimizer.schedule.warmup_steps=500", "do not fit in train.steps=400"),
        ("model={hidden_size: 8, num_heads: 1, positions: learned, max_positions: 9}", "max_posi"),
        ("parallel.pipeline=5", "parallel.pipeline=5 exceeds the number of blocks that can be"),
        ("parallel={placement: [0, 0]}", "blocks [2, 3] are missing; name one rank for each of th"),
        ("parallel={placement: [0, 0, 0, 0, 0]}", "[0, 0, 0, 0, 0]: blocks [4] do not exist"),
        ("parallel={pipeline: 2, placement: [0, 1, 2, 3]}", "ranks [2, 3] do not exist; use every"),
        ("parallel={pipeline: 3, placement: [0, 0, 2, 2]}", "ranks [1] have no block; use every "),
        ("parallel={order: zbv, split_backward: false}", "set split_backward to true, or order to"),
        (
            "parallel.order=gpipe",
            "parallel.order='gpipe' is unknown; choose 'auto', '1f1b', 'interl",
        ),
        ("parallel.tensor=3", "parallel.tensor=3 does not divide model.num_heads=4"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel=true needs tensor above 1"),
        ("data.train=[]", "data.train=[] has too few entries; give at least 1"),
        ("version=2", "version 2 of the config is unknown here"),
        ("model.hidden_size.x=3", "model.hidden_size is a value, not a section"),
        ("data.train.7.path=x", "data.train has entries 0 to 1"),
        ("data.train.7=x", "data.train has entries 0 to 1"),
        ("train.steps=[", "the value is not valid YAML"),
        (f"data.train.{'9' * 5000}=x", "no key has 5011 characters"),
        ('run_dir="a\\0b"', "the value is not valid YAML"),
        ('run_dir=""', "run_dir='' is too short; give at least 1 character"),
    ],
)
def test_refused(base: Path, override: str, part: str) -> None:
    assert part in refusal(base, override)


def test_what_tensor_parallelism_cannot_cut_is_named_at_once(base: Path) -> None:
    message = refusal(
        base,
        "parallel={tensor: 4, sequence_parallel: true}",
        "model={hidden_size: 96, num_heads: 6, num_kv_heads: 3, ffn_hidden_size: 250}",
        "data.seq_length=126",
    )
    for part in ("model.num_heads=6;", "model.ffn_hidden_size=250;", "model.num_kv_heads=3, nor",
                 "data.seq_length=126 (126 positions"):  # fmt: skip
        assert f"parallel.tensor=4 does not divide {part}" in message
    assert ": 4 problems" in message


def test_what_a_pipeline_does_not_run_is_named(base: Path) -> None:
    two = "parallel.pipeline=2"
    deepspeed = "parallel.zero_engine=deepspeed"
    message = refusal(base, two, "parallel.zero_stage=3", deepspeed)
    assert "zero_stage=3 with parallel.pipeline=2" in message
    loop = "{kind: loop, prelude: 1, core: 1, coda: 2, num_loops: 2, final_norm_after_core: true}"
    message = refusal(base, "parallel.pipeline=4", f"recurrence={loop}")
    assert "the last 2 stay together for final_norm_after_core" in message
    assert "set it to at most 3" in message
    apart = "parallel={pipeline: 3, placement: [0, 1, 1, 2]}"
    assert "the last 2 blocks stay together" in refusal(base, apart, f"recurrence={loop}")
    fine = "parallel={pipeline: 3, placement: [0, 1, 2, 2], order: greedy, split_backward: false}"
    assert load_config(base, [fine, f"recurrence={loop}"]).parallel.placement == (0, 1, 2, 2)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BASE + "model: {}\n", "key 'model' is written twice"),
        ('run_dir: "a\\0b"\n', "holds a zero byte"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("- 1\n", "holds list, not sections"),
        ("", "holds NoneType, not sections"),
    ],
)
def test_text_that_is_no_config(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "text.yaml"
    path.write_text(text)
    assert part in refusal(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(binary)


def test_anchors_and_merges(tmp_path: Path) -> None:
    """A key beside a merge wins over one that is merged in, and `<<` may stand in many sections."""
    path = tmp_path / "merged.yaml"
    merged = "optimizer: {<<: &fast {lr: 0.5, clip_norm: 7.0}, lr: 0.25}\n"
    path.write_text(
        "\n".join(line for line in BASE.split("\n") if line[:9] != "optimizer") + merged
    )
    config = load_config(path)
    assert (config.optimizer.lr, config.optimizer.clip_norm) == (0.25, 7.0)
    path.write_text("{a: &a {x: 1}, b: {<<: *a}, c: {<<: *a, x: 2}}")
    assert read_sections(path) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}


def test_overrides_are_yaml(base: Path) -> None:
    config = load_config(
        base,
        [
            "recurrence={kind: cycle, num_blocks: 2, depth: 6}",
            "data.train.1.weight=0.5",
            "optimizer.lr=3e-4",
            "optimizer.clip_norm=null",
            "optimizer.betas=[0.9, 0.99]",
            "optimizer.lr_multipliers={'blocks.*': 0.5}",
            "checkpoint.every=7",  # a section the file leaves out
            "train.recompute=true",
            "run_dir=a=b",
        ],
    )
    assert config.recurrence.kind == "cycle" and config.recurrence.depth == 6
    assert [source.weight for source in config.data.train] == [1.0, 0.5]
    assert (config.optimizer.lr, config.optimizer.clip_norm) == (3e-4, None)
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.optimizer.lr_multipliers == {"blocks.*": 0.5}
    assert (
        config.checkpoint.every == 7
        and config.train.recompute == "full"
        and config.run_dir == "a=b"
    )


def test_values_left_out_are_resolved(base: Path) -> None:
    model = load_config(base).model
    assert (model.num_kv_heads, model.head_dim, model.ffn_hidden_size) == (4, 48, 512)
    assert load_config(base, ["model.feed_forward=gelu"]).model.ffn_hidden_size == 768


RECURRENCES: list[dict[str, Any]] = [
    {"kind": "dense", "num_layers": 3},
    {"kind": "sequence", "num_blocks": 2, "depth": 5},
    {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 2},
    {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3, "initial_state": "random"},
    {"kind": "custom", "order": [0, 1, 0]},
]


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: str(r["kind"]))
def test_the_resolved_config_reads_back_to_itself(
    tmp_path: Path, recurrence: dict[str, Any]
) -> None:
    config = validate({**yaml.safe_load(BASE), "recurrence": recurrence}, "here")
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    again = load_config(path)
    assert again == config and to_yaml(again) == to_yaml(config)
    assert yaml.safe_load(to_yaml(config))["version"] == 1


def test_a_config_cannot_be_changed(base: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(base).seed = 3  # type: ignore[misc]


REMOTE_KEYS = ("path", "remote", "cache_gb")
FREE = {
    "run_dir",
    "data.tokenizer",
    *(f"data.{s}.{key}" for s in ("train.0", "train.1", "val.0") for key in REMOTE_KEYS),
    "data.val.0.weight",
    "data.verify",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.placement",
    "parallel.cluster",
    "parallel.order",
    "parallel.split_backward",
    "parallel.zero_stage",
    "parallel.zero_engine",
    "parallel.shard_group",
    "parallel.gathered_blocks",
    "parallel.bucket_mb",
    "parallel.reduce_dtype",
    "parallel.offload_optimizer",
    "parallel.sequence_parallel",
    "train.steps",
    "train.micro_batch_size",
    "train.device",
    "train.recompute",
    "train.offload_activations",
    "train.attention",
    "train.compile",
    "train.log_every",
    "train.eval_every",
    "train.eval_final",
    "train.eval_samples",
    "train.eval_bleu",
    "train.eval_depths",
    "train.eval_tasks",
    "train.profile",
    "train.sample_prompts",
    "train.sample_tokens",
    "alarms.loss_spike",
    "alarms.residual_growth",
    "alarms.non_finite",
    "alarms.window",
    "alarms.action",
    "alarms.max_roll_backs",
    "checkpoint.every",
    "checkpoint.asynchronous",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.mirror",
    "health.enabled",
    "health.slow_factor",
    "health.on_slow",
    "health.min_free_gpu",
    "health.min_free_disk_gb",
    "init_from",
    "paper",
}


def test_every_field_has_a_resume_rule_and_the_free_ones_are_these(base: Path) -> None:
    """design.md, "Checkpoints": free is how and where a run runs, fixed is what it learns."""
    leaves = flatten(load_config(base))
    assert {rule for _, rule in leaves.values()} == {"fixed", "free"}
    assert {path for path, (_, rule) in leaves.items() if rule == "free"} == FREE
    for path in ("seed", "model.dropout", "data.shuffle", "data.seq_length", "optimizer.lr",
                 "train.global_batch_size", "train.precision", "recurrence.reuse_map",
                 "optimizer.schedule.kind", "data.train.0.weight"):  # fmt: skip
        assert leaves[path][1] == "fixed", path


def test_a_resume_may_change_free_fields_only(base: Path) -> None:
    saved = load_config(base)
    free = ["train.steps=800", "train.micro_batch_size=2", "run_dir=x", "data.train.0.path=y",
            "data.val=[]", "checkpoint={every: 3}", "train.recompute=true"]  # fmt: skip
    assert changed_fixed_fields(saved, load_config(base, free)) == []
    fixed = ["seed=2", "optimizer.lr=1e-3", "data.train.1.weight=3",
             "recurrence={kind: dense, num_layers: 4}"]  # fmt: skip
    lines = changed_fixed_fields(saved, load_config(base, [*free, *fixed]))
    assert [line.split(":")[0] for line in lines] == [
        "data.train.1.weight",
        "optimizer.lr",
        "recurrence.injection",
        "recurrence.kind",
        "recurrence.num_layers",
        "recurrence.reuse_map",
        "seed",
    ]
    assert "0.001, but the run was made with 0.003" in lines[1]


def test_every_field_is_explained_or_plain() -> None:
    """The schema is also the manual: every section has a docstring."""
    assert Config.__doc__
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and hasattr(section, "model_fields"):
            assert section.__doc__, name
