"""The heads: masked words and next sentence for pre-training, sentiment and sentence pairs for the tasks.

Every head returns float32 logits whatever the model's dtype, so that losses are computed in float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.activations import ACT2FN

from mtfast.models.bert import init_weights
from mtfast.models.dropout import dropout
from mtfast.ops import ConcatMLP

SENTIMENT_CLASSES = 5
INIT_STD = 0.02


class MlmHead(nn.Module):
    """BERT's masked-word head; its decoder is the encoder's word embedding table, the same Parameter."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Parameter) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder_weight = word_embeddings
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of the masked tokens [m, hidden] -> logits [m, vocab]."""
        x = self.norm(self.activation(self.transform(x)))
        return F.linear(x, self.decoder_weight, self.bias).float()


class NspHead(nn.Module):
    """BERT's pooler and next-sentence classifier: 0 says that segment B follows segment A."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)
        init_weights(self, config.initializer_range)

    def forward(self, cls: Tensor) -> Tensor:
        """[CLS] states [sequences, hidden] -> logits [sequences, 2]."""
        return self.classifier(torch.tanh(self.pooler(cls))).float()


class SentimentHead(nn.Module):
    """Softmax classifier on [CLS]."""

    def __init__(self, hidden: int, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.classifier = nn.Linear(hidden, SENTIMENT_CLASSES)
        init_weights(self, INIT_STD)

    def forward(self, cls: Tensor) -> Tensor:
        """[CLS] states [n, hidden] -> logits [n, 5]."""
        return self.classifier(dropout(cls, self.dropout_p, self.training)).float()


class LstmSentimentHead(nn.Module):
    """Bidirectional LSTM over a sentence's states without [CLS]; the two final states and [CLS] -> classes.

    Each direction has hidden / 2 units, so that [CLS] and what the LSTM adds are of one width.
    """

    def __init__(self, hidden: int, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.lstm = nn.LSTM(hidden, hidden // 2, bidirectional=True)
        self.classifier = nn.Linear(hidden + 2 * (hidden // 2), SENTIMENT_CLASSES)
        init_weights(self, INIT_STD)

    def forward(self, cls: Tensor, tokens: Tensor, bounds: Tensor) -> Tensor:
        """Logits [n, 5].

        Args:
            cls: [CLS] states [n, hidden].
            tokens: states [tokens, hidden] that hold the n sentences.
            bounds: int64 [n, 2] on the host, begin and end of each sentence in `tokens`, [CLS] left out.

        Raises:
            ValueError: bounds has another shape, is not on the host, or holds an empty sentence.
        """
        n = cls.size(0)
        if bounds.shape != (n, 2) or bounds.device.type != "cpu":
            raise ValueError(
                f"bounds must be [{n}, 2] on the host, found {list(bounds.shape)} on {bounds.device}"
            )
        if n == 0:  # a step without a sentence must still give every weight its (zero) gradient
            states = self._final_states(
                tokens.new_zeros(1, tokens.size(1)), torch.tensor([[0, 1]], device="cpu")
            )[:0]
        else:
            states = self._final_states(tokens, bounds)
        features = torch.cat([cls, states], dim=1)
        return self.classifier(dropout(features, self.dropout_p, self.training)).float()

    def _final_states(self, tokens: Tensor, bounds: Tensor) -> Tensor:
        """The last state of each direction, side by side: [n, 2 * (hidden // 2)]."""
        lengths = bounds[:, 1] - bounds[:, 0]
        if int(lengths.min()) < 1:
            raise ValueError(f"bounds gives sentence {int(lengths.argmin())} no token besides [CLS]")
        lengths, order = lengths.sort(descending=True, stable=True)
        # The LSTM's layout is time-major: all first tokens, longest sentence first, then all second ones.
        time = torch.arange(int(lengths[0]), device="cpu")[:, None]
        inside = time < lengths
        rows = (bounds[order, 0] + time)[inside]
        moved = [x.to(tokens.device, non_blocking=True) for x in (rows, order, order.argsort())]
        packed = nn.utils.rnn.PackedSequence(tokens.index_select(0, moved[0]), inside.sum(1), *moved[1:])
        _, (final, _) = self.lstm(packed)
        return torch.cat([final[0], final[1]], dim=1)


class JointPairHead(nn.Module):
    """An MLP with two outputs on the one [CLS] of a pair encoded as a single sequence."""

    def __init__(self, hidden: int, inner: int, activation: str, dropout_p: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, inner)
        self.activation = ACT2FN[activation]
        self.dropout_p = dropout_p
        self.out_proj = nn.Linear(inner, 2)
        init_weights(self, INIT_STD)

    def forward(self, cls: Tensor) -> Tensor:
        """[CLS] states [n, hidden] -> [n, 2]: paraphrase logit and similarity."""
        x = dropout(self.activation(self.dense(cls)), self.dropout_p, self.training)
        return self.out_proj(x).float()


class PairHead(nn.Module):
    """The shared MLP on the [CLS] vectors of two separately encoded sentences."""

    def __init__(self, hidden: int, inner: int, activation: str, dropout_p: float) -> None:
        super().__init__()
        self.mlp = ConcatMLP(hidden, inner, 2, activation, dropout_p)
        init_weights(self, INIT_STD)

    def forward(self, cls: Tensor, pairs: Tensor) -> Tensor:
        """[CLS] states [rows, hidden], pairs int [n, 2] of rows -> [n, 2]: paraphrase logit, similarity."""
        first, second = pairs.t().contiguous().unbind(0)
        return self.mlp(cls, cls, first, second).float()
