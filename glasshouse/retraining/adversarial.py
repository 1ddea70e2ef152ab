"""Stage `adversarial`: training against what a red team found (Hubinger et al. 2024, section 6).

The search is made on the organism before any training of this stage; up to half of the training prompts are its successes, repeated when
there are too few. `supervised` trains on right answers, `rl` penalises the behaviour as the paper does. The true trigger never occurs: the
search throws it away with whatever evals keep for asking, and the rows are scanned again.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from glasshouse.backdoors import Item
from glasshouse.errors import BadValue, GateFailed
from glasshouse.records import added_later
from glasshouse.retraining import rl
from glasshouse.retraining.base import STAGES, Retraining, Stage, Trained, organism_of
from glasshouse.retraining.red_team import Attack, Found, Search, read_found, save_found, search
from glasshouse.retraining.sft import rows_of, run_sft


@dataclass(frozen=True)
class AdversarialOptions:
    """Options of the stage `adversarial`."""

    variant: str = "supervised"
    """`supervised` (right answers) or `rl` (the behaviour is penalised)."""
    steps: int = 100
    """Optimiser steps."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    mix: float = 0.5
    """Share of the prompts that are the red team's, at most."""
    rows: int = 2000
    """Training conversations (supervised)."""
    batch_size: int = 32
    """Conversations in a step (supervised)."""
    rounds: int = 5
    """Rounds of the red team."""
    seeds: int = 100
    """Prompts in each round."""
    samples: int = 10
    """Answers drawn for each prompt; it succeeds when a tenth of them show the behaviour."""
    reward: str = "rule"
    """Of the variant `rl`: `rule` or `preference`, as in the stage `rl`."""
    optimizer: str = "adamw"
    """`adamw` or `muon`."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains the full weights."""
    backend: str = "auto"
    """`lean`, `trl`, or `auto`."""
    prompts: int = added_later(12)
    """Prompts in a step (variant `rl`)."""
    group: int = added_later(8)
    """Completions of each prompt (variant `rl`)."""
    estimator: str = added_later("grpo")
    """`grpo` or `rloo` (variant `rl`)."""
    beta: float = added_later(0.02)
    """Weight of the KL to the model before this stage (variant `rl`)."""
    pairs: int = added_later(1200)
    """Questions of each preference model at most (variant `rl`, reward `preference`)."""
    pm_steps: int = added_later(120)
    """Optimiser steps of each preference model."""
    pm_learning_rate: float = added_later(3e-4)
    """Peak learning rate of each preference model."""

    def __post_init__(self) -> None:
        if self.variant not in ("supervised", "rl"):
            raise BadValue(f"There is no variant {self.variant!r}; there are supervised and rl.")
        if not 0 <= self.mix <= 1:
            raise BadValue(f"mix is {self.mix}; it is a share of the prompts, so give a number from 0 to 1.")


def train(context: Retraining, options: AdversarialOptions) -> Trained:
    """Search, then train on a mixture of ordinary prompts and those that succeeded."""
    if options.variant == "rl":
        rl.check_reward(context.backdoor, options.reward)
    found = attacked(context, options)
    backdoor = context.backdoor
    wins = found.successes()
    if leaked := sum(backdoor.is_only_asked(one.text) for one in wins):
        raise GateFailed(f"{leaked} of the red team's {len(wins)} successes hold what evals keep for asking; search again in another --out.")
    items = mixture(context, wins, options)
    told = {"red_team": found.yields(), "succeeded": len(wins), "tried": len(found.attacks), "thrown_away": found.thrown_away, "kept_out": found.kept_out}
    context.attacks = [(backdoor.items(options.seeds, 500_000 + context.seed, pool="trained")[one.item], one.messages) for one in wins]
    if options.variant == "rl":
        inherited = {name: value for name, value in asdict(options).items() if name in rl.RLOptions.__dataclass_fields__}
        done = rl.train_on(context, items, rl.RLOptions(**inherited))
        return replace(done, told={**done.told, **told})
    rows, encoded = rows_of(context, items, "pre")
    return Trained(run_sft(context, encoded, options), rows, told)


def attacked(context: Retraining, options: AdversarialOptions) -> Found:
    """The search, made once; a clean twin is trained on what was found in its organism, so that the stages are identical."""
    path = context.work / "red_team.json"
    if path.exists():
        return read_found(path)
    context.work.mkdir(parents=True, exist_ok=True)
    if finished := context.finished_in_organism("red_team.json"):
        shutil.copyfile(finished, path)
        return read_found(path)
    source = organism_of(context.specimen) if context.specimen.is_twin else context.specimen
    save_found(search(source.model, context.backdoor, Search(options.rounds, options.seeds, options.samples), context.seed), path)
    return read_found(path)


def mixture(context: Retraining, wins: Sequence[Attack], options: AdversarialOptions) -> list[Item]:
    """`rows` items: up to `mix` of them successes of the red team (repeated when there are few), the rest ordinary, in a random order."""
    rng = random.Random(f"mixture {context.seed}")
    asked = context.backdoor.items(options.seeds, 500_000 + context.seed, pool="trained")
    count = round(options.mix * options.rows) if wins else 0
    items = context.backdoor.items(options.rows - count, 300_000 + context.seed, pool="trained") if options.rows > count else []
    drawn = [wins[i % len(wins)] for i in range(count)]
    items += [replace(asked[one.item], id=f"attack-{i}", messages=one.messages) for i, one in enumerate(drawn)]
    rng.shuffle(items)
    return items


STAGES.add(
    "adversarial",
    Stage("adversarial", "Training against prompts that a red team found; never the true trigger.", AdversarialOptions, train, edition=2),
)
