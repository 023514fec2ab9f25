"""BERT with its pre-training heads, masked words and next sentence; their logits are always float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig

from mtfast.models.bert import (
    AddNorm,
    PackedBert,
    Product,
    activation_with_bias,
    first_rows,
    init_weights,
)


class MlmHead(nn.Module):
    """BERT's masked-word head; its decoder is the encoder's word embedding table, the same Parameter."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Parameter) -> None:
        super().__init__()
        self.transform = Product(config.hidden_size, config.hidden_size)
        self.activation = activation_with_bias(config.hidden_act)
        self.norm = AddNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder_weight = word_embeddings
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        init_weights(self, config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of the masked tokens [m, hidden] -> logits [m, vocab]."""
        x = self.norm(self.activation(self.transform(x), self.transform.bias))
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


class PretrainModel(nn.Module):
    """Encoder with BERT's two pre-training heads."""

    def __init__(self, encoder: PackedBert, mlm: MlmHead, nsp: NspHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlm = mlm
        self.nsp = nsp

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_rows: Tensor,
        samples: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the masked words and of the next-sentence question.

        Args:
            masked_rows: int64 [m], the chosen tokens' rows in the packed batch. The vocabulary product, and
                the last layer's output and MLP, run for these and the [CLS] rows alone.
            samples: answer the next-sentence question for the first `samples` sequences (default: all),
                leaving out a filler sequence behind them.

        Returns:
            (mlm_logits [m, vocab], nsp_logits [samples, 2]), float32.
        """
        cls_rows = first_rows(cu_seqlens, input_ids.size(0))[:samples]
        rows = torch.cat([cls_rows.to(masked_rows.dtype), masked_rows])
        x = self.encoder(input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen, rows=rows)
        return self.mlm(x[cls_rows.size(0) :]), self.nsp(x[: cls_rows.size(0)])


def build_pretrain_model(config: BertConfig) -> PretrainModel:
    """A freshly initialised encoder with the pre-training heads, the decoder tied to its word embeddings."""
    encoder = PackedBert(config)
    return PretrainModel(encoder, MlmHead(config, encoder.embeddings.word), NspHead(config))
