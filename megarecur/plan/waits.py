"""The reasons for which a step waits for a GPU between its first forward pass and the norm."""

from __future__ import annotations

from megarecur.config.run import Config


def find_waits(config: Config) -> list[str]:
    """Return what the host reads from the device in that span, one line each.

    Empty for most configs: the host runs ahead of the device until it reads the norm.
    """
    waits = []
    for key, scheme in (("encoder", config.encoder), ("recurrence", config.recurrence)):
        halting = getattr(scheme, "halting", None)
        if halting is not None and halting.mode != "none":
            waits.append(
                f"{key}.halting.mode={halting.mode}: every step of the map reads which samples go "
                "on"
            )
    if config.temporal is not None and (config.data.mask_documents or config.task is not None):
        waits.append("temporal: every micro batch reads which documents its chunks continue")
    if config.distill is not None and config.distill.stored is not None:
        waits.append("distill.stored: every micro batch reads its sample ids to find its logits")
    if config.parallel.zero_stage and not config.parallel.shards_natively:
        stage = config.parallel.zero_stage
        waits.append(f"parallel.zero_stage={stage}: DeepSpeed reads what it needs, not counted")
    return waits
