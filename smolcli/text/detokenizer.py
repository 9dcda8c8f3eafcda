"""Incremental detokenization: token ids to text as it is generated, up to a stop string."""

from tokenizers import Tokenizer

from smolcli.text.vocabulary_index import IndexedTokenizer


class TextDecoder:
    """Incremental decoder whose concatenated output equals `ChatTokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer | IndexedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._num_sent = 0
        self._window = 0  # the first of the tokens that are decoded together with the next one
        self._next_window = 0
        self._shown = ""  # the text of the window, which has been returned

    def push(self, token_id: int) -> str:
        """Decode one more token; returns "" while a character is incomplete.

        The token is decoded after those of the previous piece, because the text of a token may
        depend on the one before it.
        """
        self._token_ids.append(token_id)
        text = self._decode(self._window)
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown) :]
        self._window, self._next_window = self._next_window, len(self._token_ids)
        self._shown = self._decode(self._window)
        self._num_sent += len(piece)
        return piece

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:], skip_special_tokens=True)

    def flush(self) -> str:
        """Return the remaining text: U+FFFD for a character that was never completed, else ""."""
        text = self._decode(0)
        piece = text[self._num_sent :]
        self._num_sent = len(text)
        return piece


class StopString:
    """Finds one stop string in a stream of text: Knuth, Morris & Pratt 1977.

    The cost is at most two comparisons per character on average, whatever the text and the stop
    string are.

    Args:
        text: the stop string, not empty.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # length of the longest prefix that ends the text so far
        self._fallbacks = [0]  # for each prefix, its longest proper prefix that is also a suffix
        matched = 0
        for char in text[1:]:
            matched = self._next(matched, char)
            self._fallbacks.append(matched)

    def find(self, piece: str, may_end: bool = True) -> int | None:
        """Advance by a piece of text.

        Args:
            piece: the text.
            may_end: whether the stop string may end in it; otherwise it is ignored there.

        Returns:
            Where in `piece` the stop string ends, or None. The search is over once it is found.
        """
        matched = self.num_matched
        for end, char in enumerate(piece, 1):
            matched = self._next(matched, char)
            if matched == len(self.text):
                if may_end:
                    return end
                matched = self._fallbacks[-1]
        self.num_matched = matched
        return None

    def _next(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._fallbacks[matched - 1]
        return matched + (self.text[matched] == char)


class Detokenizer:
    """Turns the tokens of one answer into text, ending at the first stop string.

    The text excludes surrounding white space and, by default, the stop string. Text that may be the
    start of a stop string, and white space that may be the last, is held back until more is known.

    What follows the marker, if there is one, is not part of the text: `take_rest` returns it.

    Args:
        decoder: a new decoder.
        stop: strings that end the answer.
        marker: ends the text but not the answer; "" for no marker.
        include_stop: whether the text includes the stop string.
        keeps_space: whether surrounding white space is part of the text, as in the continuation of
            a raw prompt.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        stop: tuple[str, ...],
        marker: str = "",
        *,
        include_stop: bool = False,
        keeps_space: bool = False,
    ) -> None:
        self._decoder = decoder
        self._include_stop = include_stop
        self._keeps_space = keeps_space
        self._stop = [StopString(text) for text in stop]
        self._marker = StopString(marker) if marker else None
        self._rest: str | None = None  # after the marker; None before it
        self._shown: list[str] = []
        self._space: list[str] = []  # white space after the text shown
        self._tail = ""  # text that may be the start of a stop string
        self.is_stopped = False

    @property
    def text(self) -> str:
        """The text so far."""
        text = "".join([*self._shown, *self._space, self._tail])
        return text if self._keeps_space else text.strip()

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Take one token; returns the text that has become final.

        Args:
            token_id: the token.
            may_stop: whether a stop string may end with this token.
        """
        return self._extend(self._decoder.push(token_id), may_stop)

    @property
    def found_marker(self) -> bool:
        """Whether the text has ended at the marker."""
        return self._rest is not None

    def take_rest(self) -> str:
        """The text after the marker that no earlier call has returned."""
        rest, self._rest = self._rest or "", None if self._rest is None else ""
        return rest

    def finish(self) -> str:
        """End the answer; returns the rest of the text."""
        piece = "" if self.is_stopped else self._extend(self._decoder.flush(), may_stop=True)
        tail, self._tail = self._tail, ""
        return piece + self._show(tail)

    def _extend(self, piece: str, may_stop: bool) -> str:
        if self._rest is not None:
            self._rest += piece
            return ""
        text = self._tail + piece
        found = [(stop, stop.find(piece, may_stop)) for stop in self._stop]
        if self._marker is not None:
            found.append((self._marker, self._marker.find(piece, True)))
        ends = [(stop, end) for stop, end in found if end is not None]
        if ends:
            # Of several, the one that begins first counts.
            start, end, is_marker = min(
                (end - len(stop.text), end, stop is self._marker) for stop, end in ends
            )
            self.is_stopped = not is_marker
            self._rest = piece[end:] if is_marker else None
            includes_it = self._include_stop and not is_marker
            num_final = len(self._tail) + (end if includes_it else start)
            text = text[:num_final]
        else:
            num_final = len(text) - max((stop.num_matched for stop, _ in found), default=0)
        self._tail = text[num_final:]
        return self._show(text[:num_final])

    def _show(self, text: str) -> str:
        """Append final text; returns what can be shown of it, without trailing white space."""
        if self._keeps_space:
            self._shown.append(text)
            return text
        visible = text.rstrip()
        if not visible:
            self._space.append(text)
            return ""
        piece = "".join(self._space) + visible
        self._space = [text[len(visible) :]]
        piece = piece if self._shown else piece.lstrip()
        self._shown.append(piece)
        return piece
