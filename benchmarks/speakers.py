"""Characters of Shakespeare's plays by speaker, and two LSTM layers that predict them.

Each speaker's lines, one after the other, are cut into sequences of 80 characters; the last fifth
of them is held out. Speakers of fewer than ten sequences are left out, and of the others at most 40
are kept, so that a run ends on two cores.

References:
  McMahan et al. Communication-efficient learning of deep networks from decentralized data. AISTATS
  2017, arXiv:1602.05629 (the task and the network).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads

import fedjax_core as fc
from fedjax_core.learning.metrics import Mean

LEAST, MOST = 10, 40
LEARNING_RATE, BATCH_SIZE = 1.0, 4


def load() -> tuple[fc.datasets.FederatedDataset, dict[str, np.ndarray], int]:
    """The speakers, the sequences that are held out, and how many characters there are.

    Raises:
      LookupError: there is no text, and what to do.
    """
    workload = workloads.WORKLOADS["shakespeare"]
    reason = workloads.missing(workload)
    if reason:
        raise LookupError(reason)
    data = workloads.make(dataclasses.replace(workload, examples=(1, MOST)))
    clients, held_out = {}, []
    for position in np.flatnonzero(data.sizes >= LEAST):
        tokens = data.client(int(position))["tokens"]
        num_train = len(tokens) - len(tokens) // 5
        clients[f"speaker {position}"] = {"tokens": tokens[:num_train]}
        held_out.append(tokens[num_train:])
    test = {"tokens": np.concatenate(held_out)}
    return fc.datasets.from_clients(clients), test, data.num_classes


class CharacterLstm(nn.Module):
    """The network: 8 features a character, two layers of 256 units.

    Attributes:
      num_characters: of the text.
    """

    num_characters: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next character: ``[batch, length + 1]`` to ``[batch, length, num]``."""
        x: Any = nn.Embed(self.num_characters, workloads.EMBEDDING)(tokens[:, :-1])
        for _ in range(workloads.NUM_LAYERS):
            x = nn.RNN(nn.OptimizedLSTMCell(workloads.HIDDEN))(x)
        return nn.Dense(self.num_characters)(x)


def character_lstm(num_characters: int) -> fc.models.Model:
    """The network as a model, with the share of characters that it predicts."""

    def loss(logits: jax.Array, batch: Any) -> jax.Array:
        labels = batch["tokens"][:, 1:]
        entropies = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(entropies, axis=1)

    def accuracy(predictions: jax.Array, batch: Any, mask: jax.Array) -> Mean:
        is_right = jnp.argmax(predictions, axis=-1) == batch["tokens"][:, 1:]
        return Mean.of(jnp.mean(is_right.astype(jnp.float32), axis=1), mask)

    return fc.models.from_flax(
        CharacterLstm(num_characters),
        input_spec={"tokens": jax.ShapeDtypeStruct((workloads.SEQUENCE_LENGTH + 1,), jnp.int32)},
        loss=loss,
        metrics={"accuracy": accuracy},
        input_key="tokens",
    )
