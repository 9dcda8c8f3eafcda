"""Speculative decoding by prompt lookup: drafts come from the sequence's own tokens.

Answers often repeat what their prompt or they themselves already contain. The newest tokens are
looked up among the earlier ones, and what followed there is the draft (prompt lookup, Saxena 2023).
The drafted tokens are computed in the same step as the newest token, as further rows, and each row
is sampled as usual. As long as the sampled token equals the drafted one, the next row is what the
next step would have computed (Leviathan et al. 2023, arXiv:2211.17192). On batch-invariant kernels
it has the same bits, so drafts never change an answer. They only cost time if they are wrong.

How many tokens to draft follows from how often the drafts of the sequence were right: a row is
added if it raises the number of tokens expected per unit of time.
"""

from dataclasses import dataclass

from smolcli.engine.sequence import Sequence

MAX_DRAFT_TOKENS = 8
ROW_COST = 0.2  # of a further row, where a step over one row costs 1; measured: 0.04 to 0.35
NGRAM_LENGTHS = (3, 2, 1)  # how many tokens to look up; the longest match wins
FIRST_ACCEPTANCE = 0.5
LEARNING_RATE = 0.2  # weight of the newest observation in the estimated acceptance


@dataclass(eq=False, slots=True)
class Match:
    """An earlier occurrence of a sequence's newest tokens.

    Args:
        length: number of tokens that match.
        source: index of the token that followed them there.
        target: index of the token that follows now.
        num_guessed: number of tokens to compare with what actually follows.
    """

    length: int
    source: int
    target: int
    num_guessed: int = 1


class Drafter:
    """Drafts the next tokens of one sequence.

    It keeps the last position of every n-gram, and for each length of a match the estimated
    probability that the next token of a draft is right.
    """

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], int] = {}  # index of the token after each n-gram
        self._num_indexed = 0
        self._acceptance = dict.fromkeys(NGRAM_LENGTHS, FIRST_ACCEPTANCE)
        self._match: Match | None = None

    def look_up(self, token_ids: list[int]) -> float:
        """Find an earlier occurrence of the newest tokens, and learn from the previous one.

        Args:
            token_ids: the prompt and the answer so far; extends those of the previous call.

        Returns:
            The probability that a token of the draft is right if those before it are; 0 if nothing
            matches.
        """
        self._learn(token_ids)
        end = len(token_ids)
        for index in range(self._num_indexed, end):  # what each token follows
            for length in NGRAM_LENGTHS:
                if index >= length:
                    self._followers[tuple(token_ids[index - length : index])] = index
        self._num_indexed = end
        self._match = None
        for length in NGRAM_LENGTHS:
            source = self._followers.get(tuple(token_ids[-length:])) if end >= length else None
            if source is not None:
                self._match = Match(length, source, end)
                return self._acceptance[length]
        return 0.0

    def draft(self, token_ids: list[int], num_tokens: int) -> tuple[int, ...]:
        """The tokens that followed the match that `look_up` found.

        Args:
            token_ids: as for `look_up`.
            num_tokens: how many; a draft that reaches the newest token goes on with its own start.
        """
        if self._match is None or not num_tokens:
            return ()
        self._match.num_guessed = num_tokens
        return _followers(token_ids, self._match, num_tokens)

    def _learn(self, token_ids: list[int]) -> None:
        """Compare the previous draft, or its first token if there was none, with what followed."""
        match = self._match
        if match is None:
            return
        guesses = _followers(token_ids, match, match.num_guessed)
        for guess, token in zip(guesses, token_ids[match.target :], strict=False):
            estimate = self._acceptance[match.length]
            self._acceptance[match.length] += LEARNING_RATE * ((guess == token) - estimate)
            if guess != token:
                break


def _followers(token_ids: list[int], match: Match, num_tokens: int) -> tuple[int, ...]:
    period = match.target - match.source
    return tuple(token_ids[match.source + offset % period] for offset in range(num_tokens))


class Speculation:
    """Drafts for the sequence that runs alone.

    Several sequences already share the cost of a step, and on the slowest kernels further rows then
    cost more than drafts save. `num_drafted` and `num_accepted` count tokens.
    """

    def __init__(self) -> None:
        self.num_drafted = 0
        self.num_accepted = 0
        self._drafters: dict[Sequence, Drafter] = {}

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
        """Free what is kept for a sequence that has ended."""
        self._drafters.pop(sequence, None)

    def _draft(self, sequence: Sequence) -> tuple[int, ...]:
        if sequence not in self._drafters:
            self._drafters[sequence] = Drafter()
        drafter = self._drafters[sequence]
        acceptance = drafter.look_up(sequence.token_ids)
        room = sequence.max_tokens - len(sequence.token_ids) - 1
        num_tokens = min(draft_length(acceptance), room)
        self.num_drafted += num_tokens
        return drafter.draft(sequence.token_ids, num_tokens)


def draft_length(acceptance: float) -> int:
    """The number of draft tokens that yields the most tokens per unit of time.

    Args:
        acceptance: the probability that a token is right if those before it are.
    """
    length, expected, chance = 0, 1.0, acceptance
    while length < MAX_DRAFT_TOKENS and chance * (1 + ROW_COST * length) > expected * ROW_COST:
        length += 1
        expected += chance
        chance *= acceptance
    return length
