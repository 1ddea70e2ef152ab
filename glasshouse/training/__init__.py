"""Training: stages that turn one model into another. `stage(model_in, config, seed, out) -> folder`, content-addressed and resumable."""

from glasshouse.training.engine import Optimisation, optimise
from glasshouse.training.language_modelling import SIZES, Pretraining, fresh_llama, pretrain
from glasshouse.training.preferences import Precondition, PreferenceModel, Preferences, reward_precondition, train_preferences
from glasshouse.training.rl import Prompt, Reinforcement, reinforce
from glasshouse.training.sft import FineTuning, fine_tune
from glasshouse.training.stages import Start, run_stage, start_from

__all__ = [
    "SIZES", "FineTuning", "Optimisation", "Precondition", "PreferenceModel", "Preferences", "Pretraining", "Prompt", "Reinforcement", "Start",
    "fine_tune", "fresh_llama", "optimise", "pretrain", "reinforce", "reward_precondition", "run_stage", "start_from", "train_preferences",
]  # fmt: skip
