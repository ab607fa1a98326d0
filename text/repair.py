"""One document's text made uniform: repair, normalisation, boilerplate lines, domain forms, parts of bounded length.

Each step takes a text and returns a text; cleaning twice gives what cleaning once gave. Patterns are linear in the
length of the text, because one line of a corpus may be 50 MB long.
"""

import re
import unicodedata

# ---- repair and normalisation

CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ufffe\uffff\u00ad]")
CODE_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff]")
LINE_BREAKS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
INNER_SPACES = re.compile(r"(?<=[^ \t\n])[ \t]{2,}")
# Lines of fenced code with the line breaks around them; without a second fence, up to the end.
FENCED_CODE = re.compile(r"(?ms)(\n?^[^\S\n]*```.*?(?:\n[^\S\n]*```[^\n]*(?:\n|\Z)|\Z))")
# Thai, Lao, Myanmar, Khmer, kana and Han are written without spaces between words.
SPACELESS_SIGN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
                            "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")
WORD_OR_SIGN = re.compile(rf"{SPACELESS_SIGN.pattern}|[^\W{SPACELESS_SIGN.pattern[1:]}+")


def repair_unicode(text: str) -> str:
    """Mend mojibake, HTML entities and ligatures with ftfy; curly quotes and full-width forms stay."""
    import ftfy
    config = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False, fix_line_breaks=False, explain=False)
    # ftfy is slow: only lines that can need it go through it.
    return "\n".join(line if line.isascii() and "&" not in line else ftfy.fix_text(line, config)
                     for line in text.split("\n"))


def normalise(text: str, code: bool = False) -> str:
    """One kind of line end and space, no control characters, NFC; at most one empty line in a row and single spaces
    inside lines. Indentation and fenced code stay as they are.

    With `code`, only control characters, carriage returns and white space at the ends of lines go.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if code:
        return "\n".join(line.rstrip(" \t") for line in CODE_CONTROL.sub("", text).split("\n")).strip("\n")
    text = SPACES.sub(" ", LINE_BREAKS.sub("\n", CONTROL.sub("", text)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    # Odd parts are fenced code and keep their inner spaces, even parts are prose.
    parts = FENCED_CODE.split(text) if "```" in text else [text]
    parts[::2] = [re.sub(r"\n{3,}", "\n\n", INNER_SPACES.sub(" ", prose)) for prose in parts[::2]]
    return "".join(parts).strip("\n")


# ---- words

# A heading's marks at the beginning of a line, and the rows of a table: markdown's own signs are no words.
HEADING, TABLE_ROW = re.compile(r"(?m)^[ \t>]*#{1,6}(?=\s|\Z)"), re.compile(r"(?m)^[ \t]*\|.*$")
TABLE_MARK = re.compile(r"\||(?<![^\s|])[:-]++(?![^\s|])")


def drop_markup(text: str) -> str:
    """The text without the marks of markdown's headings and tables: "## § 5" becomes " § 5"."""
    text = HEADING.sub("", text) if "#" in text else text
    return TABLE_ROW.sub(lambda row: TABLE_MARK.sub(" ", row[0]), text) if "|" in text else text


def is_spaceless(text: str) -> bool:
    """Whether no spaces stand between the words of a text, such as one in Chinese, Japanese or Thai."""
    return not text.isascii() and len(SPACELESS_SIGN.findall(text)) > 0.3 * len(text)


def split_words(text: str, spaceless: bool) -> list[str]:
    """What stands between white space; with `spaceless` each sign, and the words of other scripts, no punctuation."""
    return WORD_OR_SIGN.findall(text) if spaceless else text.split()


# ---- boilerplate lines

NAVIGATION = frozenset({"home", "about", "about us", "contact", "contact us", "login", "log in", "sign in", "sign up",
                        "register", "search", "help", "faq", "sitemap", "site map", "privacy", "terms", "menu", "news",
                        "blog", "products", "services", "careers", "shop", "cart", "my account", "subscribe"})
BOILERPLATE = re.compile(r"""(?ix)
    skip\ (?:to|navigation)\b | jump\ to\ (?:navigation|content|search) | (?:back|go)\ to\ top | click\ here\b
  | (?:share|tweet|pin)\ (?:this|on|it|via)\b | (?:follow|like)\ us\b | print\ this\ (?:page|article) | e?-?mail\ this\b
  | (?:read|learn|show|view|see)\ (?:more|less|all)\W*\Z | continue\ reading\b | loading\W*\Z | advertisement\W*\Z
  | (?:next|previous)\ (?:page|post|article)\W*\Z | leave\ a\ (?:reply|comment)
  | posted\ (?:in|under|on|by)\ [\w\ ,]{1,30}\Z
  | (?:sign\ up|subscribe)\ (?:for|to|now|today)\b | (?:log|sign)\ in\ (?:to|with)\b | enter\ your\ e-?mail
  | (?:we|(?:this|our)\ (?:web)?site)\ uses?\ cookies | (?:accept|reject|manage)\ (?:all\ )?cookies | powered\ by\b
  | by\ (?:continuing|using)\ (?:to\ )?(?:browse|use|this\ site) | all\ rights\ reserved\W*\Z
  | forgot\ (?:your\ )?password
  | (?:copyright\ )?(?:©|\(c\)|copyright)\s*(?:19|20)\d\d | \d+\ (?:comments?|shares?|likes?|views?)\W*\Z
  | page\ \d{1,4}(?:\ of\ \d{1,4})?\W*\Z | [-–—]\ ?\d{1,4}\ ?[-–—]\Z""")
POLICY = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies")


def is_boilerplate(line: str) -> bool:
    """Whether a line is navigation, sharing, cookies, copyright or a page number.

    A line of more than 120 characters never is, nor one that begins in lower case: so a wrapped sentence goes on.
    """
    line = line.strip(" \t•*»>-–|") if line[:1] not in "-–—" else line.strip()
    if not 0 < len(line) <= 120 or line[0].islower():
        return False
    if BOILERPLATE.match(line):
        return True
    items = [item.strip().lower() for item in re.split(r"[|»›·>]", line)]
    return len(items) > 2 and sum(item in NAVIGATION for item in items) * 2 >= len(items)


def passes_c4(line: str) -> bool:
    """Whether a line keeps C4's rules (Raffel et al. 2020) as FineWeb uses them, without the one on its last character.

    It is empty, or has at least 3 words (signs, where no spaces stand between words), none above 1,000 characters, and
    no phrase of a policy or about scripts.
    """
    lower, words = line.lower(), SPACELESS_SIGN.sub(r" \g<0> ", line).split()
    return not words or (len(words) >= 3 and max(map(len, words)) <= 1000
                         and not any(phrase in lower for phrase in POLICY))


def drop_boilerplate(text: str, c4: bool = False) -> tuple[str, float]:
    """(the text without boilerplate lines and, with `c4`, without those that break C4's rules; share of words lost)."""
    lines = text.split("\n")
    kept = [line for line in lines if not is_boilerplate(line) and (not c4 or passes_c4(line))]
    if len(kept) == len(lines):
        return text, 0.0
    after = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
    spaceless = is_spaceless(text)
    return after, 1 - len(split_words(after, spaceless)) / max(1, len(split_words(text, spaceless)))


# ---- domain forms

# A reporter of United States law, without spaces and points -> its form in the Bluebook.
REPORTERS = {re.sub(r"[ .]", "", form).lower(): form for form in (
    "U.S.", "F.2d", "F.3d", "F.4th", "F. Supp.", "F. Supp. 2d", "F. Supp. 3d", "S. Ct.", "L. Ed.", "L. Ed. 2d",
    "A.2d", "A.3d", "P.2d", "P.3d", "N.E.2d", "N.E.3d", "N.W.2d", "S.E.2d", "S.W.2d", "S.W.3d", "So. 2d", "So. 3d")}
CITATION = re.compile(r"(?<![\w.])(\d{1,4}) {0,2}((?:U|F|S|L|A|P|N|So)\b\.? ?(?:S\.|(?:Supp|Ct|Ed)\.|[EW]\.)? ?"
                      r"(?:2d|3d|4th)?) {0,2}(?=\d{1,5}\b)")
ABBREVIATIONS = {"pt": "patient", "hx": "history", "dx": "diagnosis", "rx": "prescription", "tx": "treatment"}
# In lower case, or capitalised as the first word of a sentence; never beside a digit or an operator.
ABBREVIATION = re.compile(r"(?<![^\s(\"'])([hdrtHDRT]x|pt|Pt(?= (?:is|was|has|had|denies|reports|states|presents|"
                          r"presented|complains|needs)\b))(?=[\s,;:.)]|$)")
NOT_CLINICAL = re.compile(r"""(?ix)∫ | \b(?:d/dx|tx/rx|rx/tx)\b | \b(?:kidney|renal|liver|heart|lung|marrow)\ tx\b
  | \b(?:transmit\w*|receiver|antenna|packet|ethernet|serial\ port|pixels?|font|integral)\b""")


def normalise_citations(text: str) -> str:
    """Citations of United States law in one form: "410 U. S. 113" becomes "410 U.S. 113", and "§16" becomes "§ 16"."""
    def rewrite(match):
        written = match[2].strip()
        form = REPORTERS.get(re.sub(r"[ .]", "", written).lower())
        # "3 A 4" may be a list: a reporter has a point, or a series as in "5 F 2d 1".
        return f"{match[1]} {form} " if form and ("." in written or written[-1] in "dh") else match[0]
    return re.sub(r"(?<=§) *(?=\d)", " ", CITATION.sub(rewrite, text))


def expand_abbreviations(text: str) -> str:
    """Write out pt, hx, dx, rx and tx in a text that is clinical: it has two of them, or a word such as patient."""
    def expand(match):
        # "12 pt" is a font size, and in "f(x) dx" stands an integral.
        if re.search(r"[\d)\]] ?$", match.string[max(0, match.start() - 2):match.start()]):
            return match[0]
        word = ABBREVIATIONS[match[1].lower()]
        return word.capitalize() if match[1][0].isupper() else word

    if NOT_CLINICAL.search(text):
        return text
    found = {match[1].lower() for match in ABBREVIATION.finditer(text)}
    if len(found) > 1 or re.search(r"\b(?:patients?|clinic\w*|hospital\w*|symptoms?)\b", text, re.I):
        return ABBREVIATION.sub(expand, text)
    return text


# ---- parts of bounded length

# Marks of scripts that need no space behind them: Chinese, Hindi, Arabic, Urdu, Armenian, Amharic, Myanmar, Khmer.
SENTENCE_MARKS = "。！？｡।॥؟۔։።။។"
SENTENCE_END = re.compile(
    rf"""(?<![.!?…])(?:[.!?…]++["')\]”’“»]*+(?=\s|\Z)|[{SENTENCE_MARKS}]++["')\]”’“»」』）》]*+)""")
# Where a part may end, the best place first: before a section or paragraph, behind a line, a sentence or a word.
PART_ENDS = (re.compile(r"\n\n+(?=\S)"), re.compile(r"\n"), SENTENCE_END, re.compile(" "))


def split_text(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters that join to the text.

    A part ends at the last of the best PART_ENDS that its second half has. With limit 12, "one two. three" becomes
    "one two.", " three".
    """
    parts, start = [], 0
    while (rest := len(text) - start) > limit:
        # A little above an equal share of the rest, so that no scrap is left for the last part.
        room = min(limit, rest // -(-rest // limit) + limit // 8)
        window = text[start:start + room]
        ends = ([match.end() for match in place.finditer(window, room // 2)] for place in PART_ENDS)
        cut = next(filter(None, ends), [room])[-1]
        parts.append(window[:cut])
        start += cut
    return [*parts, text[start:]]
