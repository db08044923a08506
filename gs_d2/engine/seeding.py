"""Random numbers as a function of where training is, so that a resumed run gets those of an uninterrupted one."""

import random

import numpy as np
import torch

# What is seeded: no two of these share random numbers.
ORDER, SAMPLE, STEP = range(3)


def derive_seeds(seed: int, purpose: int, a: int, b: int = 0, c: int = 0) -> np.ndarray:
    """Four independent words (uint32) of this place; all arguments are integers >= 0."""
    return np.random.SeedSequence([seed, purpose, a, b, c]).generate_state(4)


def seed_generators(seed: int, purpose: int, a: int, b: int = 0, c: int = 0):
    """Sets the generators of random, numpy and torch to a state that only the arguments decide.

    The GPU's is set where this process uses one.
    """
    words = [int(word) for word in derive_seeds(seed, purpose, a, b, c)]
    random.seed(words[0])
    np.random.seed(words[1])
    of_torch = (words[2] << 31) ^ words[3]
    torch.default_generator.manual_seed(of_torch)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(of_torch)
