"""Hidden states to tokens.

Order as in transformers: repetition penalty (Keskar et al. 2019, arXiv:1909.05858), constraint,
temperature, top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751). A draw depends on the sequence's
own logits, settings and generator alone: only rows of one kind are computed together.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from smolcli.engine.interfaces import Head, Masks, forbid
from smolcli.engine.sequence import Sequence, TokenLogprob
from smolcli.types import Sampling

FINE = 64  # so many likeliest tokens have their likelihoods from float32
NUCLEUS = 512  # so many likeliest tokens hold the share of top-p nearly always; sorting all is slow


def choose(head: Head, hidden: Tensor, sequences: list[Sequence]) -> list[int]:
    """The next token of each sequence: the most likely, or drawn as its settings say.

    Args:
        head: turns hidden states into scores.
        hidden: (N, hidden).
        sequences: N of them.
    """
    plain = [i for i, s in enumerate(sequences) if s.sampling.is_plain]
    if len(plain) == len(sequences):
        return _likeliest(head, hidden, sequences)
    others = [i for i, s in enumerate(sequences) if not s.sampling.is_plain]
    scored = choose_scored(head.logits(hidden[others]), [sequences[i] for i in others])
    tokens = dict(zip(others, scored, strict=True))
    if plain:
        best = _likeliest(head, hidden[plain], [sequences[i] for i in plain])
        tokens.update(zip(plain, best, strict=True))
    return [tokens[i] for i in range(len(sequences))]


def choose_scored(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """As `choose`, from float32 logits of (N, vocab_size), which are changed in place."""
    for row, sequence in zip(logits, sequences, strict=True):
        if sequence.sampling.repetition_penalty != 1.0:
            _penalize(row, sequence)
    forbid(logits, masks(sequences))
    tokens: list[int] = logits.argmax(-1).tolist()
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, sequence in enumerate(sequences):
        if not sequence.sampling.is_greedy:
            groups[_kind(sequence.sampling)].append(i)
    for (top_k, is_cut), members in groups.items():
        draws = _draw(logits[members], [sequences[i] for i in members], top_k, is_cut)
        for i, token in zip(members, draws, strict=True):
            tokens[i] = token
    return tokens


def score(
    head: Head, hidden: Tensor, sequences: list[Sequence], tokens: list[int]
) -> list[TokenLogprob | None]:
    """How likely the tokens are that were chosen, for the sequences that ask.

    As the model has it, among what a constraint allows: before penalty, temperature and cuts.
    """
    scores: list[TokenLogprob | None] = [None] * len(sequences)
    asking = [i for i, s in enumerate(sequences) if s.top_logprobs is not None]
    if not asking:
        return scores
    logits = head.logits(hidden[asking])
    forbid(logits, masks([sequences[i] for i in asking]))
    head.refine(hidden[asking], logits, FINE)
    for i, row in zip(asking, logits.log_softmax(-1), strict=True):
        top = row.topk(sequences[i].top_logprobs or 0)
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        possible = tuple((token, logprob) for token, logprob in likeliest if logprob > -math.inf)
        scores[i] = TokenLogprob(tokens[i], row[tokens[i]].item(), possible)
    return scores


def _likeliest(head: Head, hidden: Tensor, sequences: list[Sequence]) -> list[int]:
    return head.best(hidden, masks(sequences))


def masks(sequences: list[Sequence]) -> Masks:
    """What the sequences' constraints allow next."""
    return [s.constraint.mask() if s.constraint else None for s in sequences]


def _penalize(row: Tensor, sequence: Sequence) -> None:
    ids = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
    scores = row[ids]
    penalty = sequence.sampling.repetition_penalty
    row[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _kind(sampling: Sampling) -> tuple[int, bool]:
    """Rows of one kind take the same way: their top-k, and whether they are cut at all."""
    return sampling.top_k, sampling.top_k > 0 or sampling.top_p < 1.0


def _draw(logits: Tensor, sequences: list[Sequence], top_k: int, is_cut: bool) -> list[int]:
    """Inverse-transform sampling over rows of one kind."""
    temperature = _column(logits, [s.sampling.temperature for s in sequences])
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature.clamp(min=1e-6)
    uniform = _column(logits, [s.draw_uniform() for s in sequences])
    if not is_cut:
        return _pick(scores.softmax(-1), uniform).tolist()
    top_p = _column(logits, [s.sampling.top_p for s in sequences])
    vocab_size = scores.shape[-1]
    if top_k:
        return _draw_likeliest(scores, top_p, uniform, min(top_k, vocab_size), True)[0].tolist()
    tokens, shares = _draw_likeliest(scores, top_p, uniform, min(NUCLEUS, vocab_size), False)
    short = (shares < top_p).squeeze(-1).nonzero().squeeze(-1)  # rows of a flatter distribution
    if len(short):
        rest = (scores[short], top_p[short], uniform[short])
        tokens[short] = _draw_likeliest(*rest, vocab_size, False)[0]
    return tokens.tolist()


def _draw_likeliest(
    scores: Tensor, top_p: Tensor, uniform: Tensor, width: int, has_top_k: bool
) -> tuple[Tensor, Tensor]:
    """Draw from the top-p share of the `width` likeliest tokens.

    Returns:
        The tokens, (N,), and what share of all the `width` likeliest hold, (N, 1); all is what
        top-k leaves, or the whole vocabulary.
    """
    top, ids = scores.topk(width)  # (N, width), descending
    total = (top if has_top_k else scores).logsumexp(-1, keepdim=True)
    probs = (top - total).exp()
    before = probs.cumsum(-1) - probs  # mass of all that is likelier
    picks = _pick(probs.masked_fill(before >= top_p, 0.0), uniform)
    return ids.gather(-1, picks[:, None]).squeeze(-1), probs.sum(-1, keepdim=True)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """(N, K) weights and (N, 1) numbers from 0 to 1 -> (N,) places."""
    mass = weights.cumsum(-1)
    places = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    return places.squeeze(-1).clamp(max=weights.shape[-1] - 1)


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
