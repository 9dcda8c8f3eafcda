"""From hidden states to tokens and their log probabilities, on the host.

Settings apply in vLLM's order: bias, penalties for repetition (Keskar et al. 2019,
arXiv:1909.05858), frequency and presence, the mask of allowed tokens, temperature, min-p (Nguyen et
al. 2024, arXiv:2407.01082), top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751).
Rows are sampled one by one, so a sample depends on the sequence's own logits, settings and random
generator, and on nothing else in the batch.
"""

import math

import numpy as np

from smolcli.engine.interfaces import Array, Head, Hidden, select_rows, unpack_mask
from smolcli.engine.sequence import Sequence, TokenLogprob
from smolcli.types import Sampling

MIN_TEMPERATURE = 1e-6  # avoids overflow; sampling at it is all but greedy
MIN_REPETITION_PENALTY = 1e-6  # likewise; logits divided by it are still far from infinity
SUM_BLOCK = 256
MAXIMA_STRIDE = 64  # distance of the values that `_largest` compares first
SCORED_ROWS = 32  # rows of logits to hold at once; 6 MiB for 49,152 tokens
NUCLEUS_TOKENS = 512  # nearly always contain the top-p mass; sorting the vocabulary is slow


def sample(
    head: Head, hidden: Hidden, sequences: list[Sequence]
) -> list[tuple[int, TokenLogprob | None]]:
    """Choose the next token of each sequence.

    Args:
        head: computes logits.
        hidden: (N, hidden_size).
        sequences: the N sequences.

    Returns:
        Each sequence's token and, if it asks for them, the token's log probabilities.

    Raises:
        FloatingPointError: the largest logit of a row is not a finite number.
        QueryError: the settings of a sequence allow no token.
    """
    masks = [sequence.mask() for sequence in sequences]
    tokens: dict[int, int] = {}
    logprobs: dict[int, TokenLogprob] = {}
    greedy = [i for i, s in enumerate(sequences) if s.sampling.is_plain]
    if greedy:
        best = head.best(select_rows(hidden, greedy), [masks[i] for i in greedy])
        tokens.update(zip(greedy, best, strict=True))
    rest = [i for i, s in enumerate(sequences) if i not in tokens or s.top_logprobs is not None]
    for i, row in zip(rest, head.logits(select_rows(hidden, rest)) if rest else (), strict=True):
        sequence, top_logprobs = sequences[i], sequences[i].top_logprobs
        if i not in tokens:
            scratch = row if top_logprobs is None else row.copy()
            tokens[i] = sample_token(scratch, sequence, masks[i])
        if top_logprobs is not None:
            apply_mask(row, masks[i])
            logprobs[i] = token_logprob(row, tokens[i], top_logprobs)
    return [(tokens[i], logprobs.get(i)) for i in range(len(sequences))]


def score(
    head: Head, hidden: Hidden, token_ids: list[int], num_alternatives: int
) -> list[TokenLogprob]:
    """The log probabilities of given tokens, such as those of a prompt.

    Only a few rows of logits are in memory at any time.

    Args:
        head: computes logits.
        hidden: (N, hidden_size).
        token_ids: the N tokens that follow.
        num_alternatives: how many of the most likely tokens to list for each.

    Raises:
        FloatingPointError: the largest logit of a row is not a finite number.
    """
    scores: list[TokenLogprob] = []
    for start in range(0, len(token_ids), SCORED_ROWS):
        part = slice(start, start + SCORED_ROWS)
        rows = zip(head.logits(hidden[part]), token_ids[part], strict=True)
        scores += [token_logprob(row, token, num_alternatives) for row, token in rows]
    return scores


def sample_token(logits: Array, sequence: Sequence, mask: bytes | None = None) -> int:
    """Choose one token according to the sequence's settings.

    Args:
        logits: (vocab_size,), float32; overwritten.
        sequence: its settings, previous tokens and random generator.
        mask: the allowed tokens; None allows all.

    Raises:
        FloatingPointError: the largest logit is not a finite number.
    """
    sampling = sequence.sampling
    if sampling.changes_logits:
        _adjust(logits, sequence)
    apply_mask(logits, mask)
    if not math.isfinite(logits.max()):
        raise FloatingPointError("the model computed logits that are not finite numbers")
    if sampling.is_greedy:
        return int(logits.argmax())
    return _inverse_transform(logits, sampling, sequence.draw_uniform())


def token_logprob(logits: Array, token: int, num_alternatives: int) -> TokenLogprob:
    """The log probability of a token and of the most likely tokens, before sampling settings.

    Args:
        logits: (vocab_size,), masked, without penalty and temperature.
        token: the token that was chosen.
        num_alternatives: how many of the most likely tokens to list.

    Raises:
        FloatingPointError: the largest logit is not a finite number.
    """
    highest = float(logits.max())
    if not math.isfinite(highest):
        raise FloatingPointError("the model computed logits that are not finite numbers")
    log_total = highest + math.log(np.exp(logits - highest).sum(dtype=np.float64))
    ids = [int(i) for i in _largest(logits, num_alternatives)] if num_alternatives else []
    likely = tuple((i, float(logits[i]) - log_total) for i in ids if logits[i] > -math.inf)
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    return TokenLogprob(token, float(logits[token]) - log_total, rank, likely)


def apply_mask(logits: Array, mask: bytes | None) -> None:
    """Set the logits of forbidden tokens to minus infinity, in place."""
    if mask is not None:
        logits[~unpack_mask(mask, len(logits))] = -np.inf


def _adjust(logits: Array, sequence: Sequence) -> None:
    """Apply bias and penalties in place. Only repetition looks at the prompt as well."""
    sampling = sequence.sampling
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        logits[list(ids)] += np.array(biases, np.float32)
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(sequence.token_ids)
        scores = logits[seen]
        penalty = max(sampling.repetition_penalty, MIN_REPETITION_PENALTY)
        logits[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_output:
        seen, counts = np.unique(sequence.output_ids, return_counts=True)
        penalties = sampling.frequency_penalty * counts + sampling.presence_penalty
        logits[seen] -= penalties.astype(np.float32)


def _inverse_transform(logits: Array, sampling: Sampling, uniform: float) -> int:
    """Inverse transform sampling in float64."""
    if sampling.top_k:
        ids = _largest(logits, sampling.top_k)
        kept = _weights(logits, sampling, ids)
        total = kept.sum()
    else:
        weights = _weights(logits, sampling)
        if sampling.top_p >= 1.0:
            return _quantile_index(weights, uniform)
        total = weights.sum()
        ids = _largest(logits, NUCLEUS_TOKENS)
        if weights[ids].sum() < sampling.top_p * total:  # a flat distribution
            ids = _largest(logits, len(logits))
        kept = weights[ids]
    mass_before = np.cumsum(kept) - kept  # of all tokens that are more likely
    kept[mass_before >= sampling.top_p * total] = 0.0
    return int(ids[_quantile_index(kept, uniform)])


def _weights(logits: Array, sampling: Sampling, ids: Array | None = None) -> Array:
    """Weights proportional to the probabilities of all tokens, or of `ids`; float64.

    The largest of all is 1. Those below min-p are 0.
    """
    scores = (logits if ids is None else logits[ids]).astype(np.float64)
    scores -= logits.max()
    scores /= max(sampling.temperature, MIN_TEMPERATURE)
    weights: Array = np.exp(scores, out=scores)
    if sampling.min_p:
        weights[weights < sampling.min_p] = 0.0
    return weights


def _largest(values: Array, count: int) -> Array:
    """Indices of the `count` largest values in descending order; of equals, the lower index."""
    size = len(values)
    if count < size:
        maxima = values  # at least `count` values are as large as the `count` largest maxima
        if count < size // MAXIMA_STRIDE // 2:
            whole = values[: size - size % MAXIMA_STRIDE]
            maxima = whole.reshape(MAXIMA_STRIDE, -1).max(axis=0)
        threshold = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(size)
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def _quantile_index(weights: Array, uniform: float) -> int:
    """Index of the weight that holds the fraction `uniform` of the total; never a zero weight.

    Sums blocks first, because a running sum over a whole vocabulary is slow.
    """
    starts = np.arange(0, len(weights), SUM_BLOCK)
    block, rest = _locate(np.add.reduceat(weights, starts), uniform)
    start = starts[block]
    return int(start) + _locate(weights[start : start + SUM_BLOCK], rest)[0]


def _locate(weights: Array, fraction: float) -> tuple[int, float]:
    """The index that holds a fraction of the total, and the fraction of that weight below it."""
    mass = np.cumsum(weights)
    target = fraction * mass[-1]
    last = np.searchsorted(mass, mass[-1])  # the last weight that is not zero
    index = int(min(np.searchsorted(mass, target, side="right"), last))
    below = mass[index - 1] if index else 0.0
    return index, min((target - below) / weights[index], 1.0)
