"""A model of the next character, trained by Keras on the text of the Apache licence.

    KERAS_BACKEND=torch python examples/keras_text.py

Each position sees the 32 characters before it. ALiBi tells how far away they are, and a learned
sink lets a head see nothing. Change KERAS_BACKEND to "jax" or "tensorflow": nothing else changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

import tilefold
from tilefold.keras import MultiHeadAttention

TEXT = Path(__file__).parents[1] / "LICENSE"
LENGTH = 128
"""Characters of a sequence."""


def sequences(text: str) -> tuple[NDArray[np.int32], str]:
    """The text as rows of numbers, (number, LENGTH + 1), and the letter of each number."""
    letters = "".join(sorted(set(text)))
    numbers = np.array([letters.index(letter) for letter in text], np.int32)
    starts = np.arange(0, len(numbers) - LENGTH - 1, LENGTH // 2)
    return numbers[starts[:, None] + np.arange(LENGTH + 1)], letters


def model_of(letters: int, size: int = 64) -> keras.Model:
    """One block of a transformer; it takes sequences of any length."""
    given = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(letters, size)(given)
    attention = MultiHeadAttention(
        num_heads=4,
        key_dim=16,
        mask=tilefold.causal() & tilefold.local(32),
        score=tilefold.alibi(),
        sinks=True,
        dropout=0.1,
        name="attention",
    )
    normal = keras.layers.LayerNormalization()(x)
    x = x + attention(normal, normal)
    hidden = keras.layers.Dense(4 * size, activation="gelu")(keras.layers.LayerNormalization()(x))
    x = x + keras.layers.Dense(size)(hidden)
    return keras.Model(given, keras.layers.Dense(letters)(x))


def trained(epochs: int = 12) -> tuple[keras.Model, list[float], str]:
    """The model, its loss (nats per character) after each epoch, and its letters."""
    keras.utils.set_random_seed(0)
    rows, letters = sequences(TEXT.read_text(encoding="utf-8"))
    model = model_of(len(letters))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    history: Any = model.fit(rows[:, :-1], rows[:, 1:], batch_size=16, epochs=epochs, verbose=0)
    return model, history.history["loss"], letters


def main() -> None:
    """Train, and say what the model learned."""
    _, losses, letters = trained()
    print(f"{keras.backend.backend()}: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats, where")
    print(f"guessing among {len(letters)} letters has {np.log(len(letters)):.2f}")


if __name__ == "__main__":
    main()
