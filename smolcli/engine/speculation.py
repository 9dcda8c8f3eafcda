"""Speculative decoding by n-gram lookup: drafts come from the tokens that were seen before.

Answers often repeat what their prompt, earlier answers or they themselves contain. The newest
tokens are looked up among the earlier ones of all sequences, and what followed there is the draft
(prompt lookup, Saxena 2023). The drafted tokens are computed in the same step as the newest token,
as further rows, and each row is sampled as usual. As long as the sampled token equals the drafted
one, the next row is what the next step would have computed (Leviathan et al. 2023,
arXiv:2211.17192). On batch-invariant kernels it has the same bits, so drafts never change an
answer; wrong ones cost time.

How many tokens to draft follows from how often drafts were right: a row is added if it raises the
number of tokens expected per unit of time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from smolcli.engine.sequence import Sequence

MAX_DRAFT_TOKENS = 8
# Costs of drafted rows, where a step over one row costs 1; measured: 0.01 to 0.12, 0.05 to 0.35.
FIRST_ROW_COST = 0.1
FURTHER_ROW_COST = 0.25
NGRAM_LENGTHS = (8, 4, 2, 1)  # how many tokens to look up; the longest match wins
MAX_NGRAMS = 1 << 15  # in each of two generations, about 5 MB
INITIAL_ACCEPTANCE = 0.3
LEARNING_RATE = 0.1  # weight of the newest observation in the estimated acceptance


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may come next.

    Args:
        token: what followed the newest tokens before.
        length: how many of them matched.
    """

    token: int
    length: int


class NgramIndex:
    """What last followed each n-gram.

    Once `MAX_NGRAMS` are held, they become the older generation, and the one before is forgotten.
    """

    def __init__(self) -> None:
        self._newer: dict[tuple[int, ...], int] = {}
        self._older: dict[tuple[int, ...], int] = {}

    def add(self, token_ids: list[int], start: int) -> None:
        """Remember what each of the tokens from index `start` on follows."""
        for index in range(start, len(token_ids)):
            for length in NGRAM_LENGTHS:
                if index >= length:
                    self._newer[tuple(token_ids[index - length : index])] = token_ids[index]
            if len(self._newer) >= MAX_NGRAMS:
                self._newer, self._older = {}, self._newer

    def guesses(self, token_ids: list[int], num_tokens: int) -> list[Guess]:
        """What may follow, each guess after the ones before it.

        Args:
            token_ids: the tokens so far.
            num_tokens: the most guesses to make; fewer if nothing matches.
        """
        newest = token_ids[-max(NGRAM_LENGTHS) :]
        guesses: list[Guess] = []
        while len(guesses) < num_tokens and (guess := self._guess(newest)):
            guesses.append(guess)
            newest.append(guess.token)
        return guesses

    def _guess(self, newest: list[int]) -> Guess | None:
        for length in NGRAM_LENGTHS:
            ngram = tuple(newest[-length:])
            token = self._newer.get(ngram, self._older.get(ngram))
            if token is not None:
                return Guess(token, length)
        return None


@dataclass(slots=True)
class Progress:
    """How far a sequence has been indexed, and what may come next.

    Args:
        num_indexed: how many of its tokens are in the index.
        guesses: what may follow these tokens, to be compared with what does.
    """

    num_indexed: int = 0
    guesses: list[Guess] = field(default_factory=list)


class Speculation:
    """Drafts for the sequence that runs alone.

    Several sequences already share the cost of a step, and on the slowest kernels further rows then
    cost more than drafts save. `num_drafted` and `num_accepted` count tokens.
    """

    def __init__(self) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._index = NgramIndex()
        self._acceptance = dict.fromkeys(NGRAM_LENGTHS, INITIAL_ACCEPTANCE)
        self._progress: dict[Sequence, Progress] = {}

    def drafts(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """Draft tokens for sequences that are decoded in one step.

        Args:
            sequences: all sequences of the step.

        Returns:
            One draft per sequence, which may be empty.
        """
        if len(sequences) > 1 or not all(sequence.takes_best for sequence in sequences):
            return [()] * len(sequences)
        return [self._draft(sequence) for sequence in sequences]

    def forget(self, sequence: Sequence) -> None:
        """Free what is kept for a sequence that has ended, except its tokens."""
        self._progress.pop(sequence, None)

    def _draft(self, sequence: Sequence) -> tuple[int, ...]:
        token_ids = sequence.token_ids
        progress = self._progress.setdefault(sequence, Progress())
        self._learn(progress.guesses, token_ids[progress.num_indexed :])
        self._index.add(token_ids, progress.num_indexed)
        progress.num_indexed = len(token_ids)
        guesses = self._index.guesses(token_ids, MAX_DRAFT_TOKENS)
        room = sequence.max_tokens - len(token_ids) - 1
        length = min(draft_length(self._acceptance[guess.length] for guess in guesses), room)
        progress.guesses = guesses[: max(length, 1)]  # learns from the first one in any case
        self.num_drafted += length
        return tuple(guess.token for guess in guesses[:length])

    def _learn(self, guesses: list[Guess], token_ids: list[int]) -> None:
        """Compare guesses with what followed, up to the first that was wrong."""
        for guess, token in zip(guesses, token_ids, strict=False):
            estimate = self._acceptance[guess.length]
            self._acceptance[guess.length] += LEARNING_RATE * ((guess.token == token) - estimate)
            if guess.token != token:
                break


def draft_length(acceptances: Iterable[float]) -> int:
    """The number of draft tokens that yields the most tokens per unit of time.

    Args:
        acceptances: for each guess, the probability that it is right if those before it are.
    """
    best, best_rate = 0, 1.0
    expected, cost, chance = 1.0, 1 + FIRST_ROW_COST, 1.0
    for length, acceptance in enumerate(acceptances, 1):
        chance *= acceptance
        expected += chance
        if expected / cost > best_rate:
            best, best_rate = length, expected / cost
        cost += FURTHER_ROW_COST
    return best
