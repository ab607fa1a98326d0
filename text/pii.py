"""Personal data in text: e-mail and IP addresses, telephone numbers, IBANs, cards, labelled identity numbers, keys.

Each becomes a constant placeholder of its type, such as <EMAIL>; names stay. Where clauses of statutes, versions or
source code look the same, what stands beside a match decides.
"""

import ipaddress
import re
from collections import Counter

OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Country -> characters of its IBANs.
IBAN_LENGTH = dict(re.findall(r"([A-Z]{2})(\d\d)", (
    "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29CH21CR22CY28CZ24DE22DK18DO28EE20ES24FI18FO18FR27GB22GE22GI23GL18GR27"
    "HR21HU28IE22IL23IS26IT27JO30KW30KZ20LB28LI21LT20LU20LV21MC27MD24ME22MK19MT31NL18NO15PK24PL28PS29PT25QA29RO24"
    "RS22SA24SE24SI19SK24SM27TN24TR26UA29VG24XK20")))
# Literal prefix -> pattern of the key. The prefixes are searched first, because that is fast where they are rare.
KEY_MARKS = {
    "AKIA": r"AKIA[0-9A-Z]{16}", "ASIA": r"ASIA[0-9A-Z]{16}",
    **{f"gh{kind}_": rf"gh{kind}_[A-Za-z0-9]{{36}}" for kind in "pousr"},
    "github_pat_": r"github_pat_\w{22,90}", "glpat-": r"glpat-[\w-]{20}", "xox": r"xox[abprs]-[\w-]{10,80}",
    "AIza": r"AIza[\w-]{35}", "hf_": r"hf_[A-Za-z0-9]{34}", "npm_": r"npm_[A-Za-z0-9]{36}",
    "sk_live_": r"sk_live_[A-Za-z0-9]{24,99}", "sk-": r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,200}",
    "eyJ": r"eyJ[\w-]{10,500}\.eyJ[\w-]{10,2000}\.[\w-]{10,500}"}
KEY = re.compile(rf"(?<![\w/+-])(?:{'|'.join(KEY_MARKS.values())})(?![\w-])")
PRIVATE_KEY = re.compile("-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[^-]*+(?:-----END [A-Z ]{0,20}PRIVATE KEY-----)?")
LABELLED_KEY = re.compile(r"""(?xi)((?:api[_-]?key|secret|token|password)["']?\s{0,2}[:=]\s{0,2}["'])
    (?=[a-z_/+=-]{0,99}\d)(?=[^a-z"']{0,99}[a-z])[a-z0-9_/+=-]{24,128}(?=["'])""")
EMAIL = re.compile(r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+"
                   r"(?:[Xx][Nn]--[A-Za-z0-9-]{2,59}|[A-Z]{2,24}|[A-Za-z][a-z]{1,23})(?![\w-]|\.\w)")
# With one of these top-level domains even what looks like code is an address.
SURE_TLD = re.compile("com|org|net|edu|gov|mil|int|info|biz|name|pro|aero|coop|museum|dev|app|cloud|online|health|law|"
                      "example|test|invalid|local")
# Attributes of programs, suffixes of files and units of systemd, none of them a top-level domain.
NO_TLD = re.compile(
    "weights?|bias|grad|values?|array|kernel|matrix|mat|inverse|inv|real|imag|conj|conjugate|transpose|adjoint|proj|jit|"
    "class|func|type|shape|size|png|jpe?g|gif|svg|webp|ico|tgz|whl|jar|json|ya?ml|toml|txt|html?|conf|log|service|socket|"
    "timer|slice|mount|device|path")
CODE_HOST = re.compile(r"(?:self|cls|v?\d+|\dx)\.")
IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(r"""(?x)(?<![\w.-])(?: \d{4}([ -]?)\d{4}\1\d{4}\1\d{4} | 3[47]\d\d([ -]?)\d{6}\2\d{5}
  | 3[068]\d\d([ -]?)\d{6}\3\d{4} )(?![\w-]|\.\d)""")
IDENTITY_MARKS = ("ssn", "nino", "mrn", "security", "insurance", "nhs", "record", "passport", "patient", "licen", "tax")
IDENTITY = re.compile(r"""(?x)((?i:\b(?:SSN|NINO|MRN|social\ security|national\ insurance|NHS|medical\ record|passport
  | patient | driver'?s?\ licen[cs]e | tax(?:payer)?\ id(?:entification)?)(?:\ (?:number|no\.?|id|\#))?(?:\ is)?
  \s?[:\#]?\s{0,2})) (?:[A-Z]{0,3}[ -]?\d(?:[ -]?\d){4,14}(?:\ ?[A-Z])?)(?!\w)""")
PHONE = re.compile(r"""(?x)(?<![\w.+-])(?:
    \+\d{1,3}[ -]?(?:\(\d{1,4}\)[ -]?)?\d(?:[ -]?\d){6,12}
  | (?:1[ .-])?(?:\([2-9]\d\d\)[ .-]?[2-9]\d\d[ .-]|[2-9]\d\d[-.][2-9]\d\d[-.])\d{4})(?!\w|[-.]\d)""")
# A label, then digits that are no date.
LABELLED_PHONE = re.compile(
    r"(?i)((?<![\w.])(?:(?:tele)?phone|telefax|fax|mobile|cell(?=:)|tel|call|dial|whatsapp|(?:help|hot)line|ph(?=:)"
    r"|reach(?=\s(?:me|us|him|her|them)\s))\b\.?(?:\s(?:no\.?|number|me|us|him|her|them))?(?:\s(?:at|is))?\s?[:#]?\s?)"
    r"(?!(?:\d\d?[/.-]\d\d?[/.-](?:19|20)\d\d|(?:19|20)\d\d-\d\d-\d\d)(?![ /.-]?\d))"
    r"\+?\(?\d(?:[ ()./-]{0,2}\d){6,14}(?!\w)")
NOT_PHONE = re.compile(r"""(?ix)(?:\bno\.?|\#|№|§|\b(?:docket|case|isbn|issn|pmid|doi|patent|serial|section|version))
  \s?:?\s?\Z""")
IP4 = re.compile(rf"(?<![\w.-]){OCTET}(?:\.{OCTET}){{3}}(?![\w-]|\.\d)")
IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
# What stands before the number of a clause, a version or a table; and "and", "to" between several of them.
OUTLINE = re.compile(r"""(?ix)(?:\b(?:(?:sub)?(?:section|clause|paragraph)s?|secs?\.?|articles?|arts?\.?|paras?\.?
  | parts?|chapters?|ch\.|rules?|regulations?|reg\.|schedules?|annex|appendix|items?|tables?|figures?|figs?\.|steps?
  | versions?|ver\.?|v\.?|releases?|no\.|oid|ec)|§)
  [\s:(=]*(?:[\d.()a-z]{1,16}(?:,|\ and|\ or|\ to|\ through|,\ and)\s){0,4}\Z""")
# What stands before an address on the same line. The line before it may be the end of another clause.
ADDRESS_BEFORE = re.compile(rf"""(?ix)(?: [a-z]:// | @ | (?::[\da-f]{{0,4}}){{1,7}}: | (?:
    (?:(?<![a-z])|(?-i:(?<=[a-z])(?=[A-Z]))) (?-i:(?!(?<=<)IP>)) (?:
      ip(?:v4)?(?:_?(?:addr(?:ess)?|network|interface))? | addr(?:ess(?:es)?)? | inet | hosts? | hostname
      | (?:name)?servers? | dns | gateway | clients? | peers? | proxy | router | endpoint | src | dst | ping | ssh
      | telnet | traceroute | curl | nmap ) (?:\ (?:is|was|are))?
    | (?<![a-z])(?: connect(?:ed|ing|ions?)? | log(?:ged|s)?(?:\ ?(?:in|on))? | ping(?:s|ed|ing)? | packets? | traffic
      | listen(?:s|ing)? | bind | root | user\ [\w.-]{{1,16}} | routed? | servers? | hosts? | redirect(?:s|ed)? )
      \ (?:to|from|at|on|via)
    | \d\d:\d\d:\d\d(?:[.,]\d{{1,6}})?(?:Z|\ ?[+-]\d{{4}})? )
  (?:["'],)?[\])"'\ \t]{{0,3}}[ \t:="'(\[<>-]{{0,6}}(?:{IP4.pattern}(?:,|\ and|\ or|\ to|,\ and)\ ){{0,4}} )\Z""")
# Without one of these close before it, a number never meets the slow pattern above.
ADDRESS_SIGN = re.compile(r"[A-Za-z:@]")
ADDRESS_BEHIND = re.compile(r"""(?x):\d{2,5}(?![\d.]) | /\d\d?(?![\d/.]) | [\])"']?\s-\s\S{1,32}\s\[
  | \W{1,4}(?:GET|POST|PUT|HEAD|DELETE|OPTIONS|PATCH|CONNECT)\ [/h*]
  | (?:\s\w{1,16}){0,2}\s(?:port\s\d | logged\s(?:in|out|on|off)\b | netmask\b | timed\ out | unreachable | ttl\b
  | icmp\b | [Tt][Cc][Pp]\b | [Uu][Dd][Pp]\b)""")


def scrub(text: str) -> tuple[str, dict]:
    """(text with <KEY>, <EMAIL>, <IBAN>, <CARD>, <ID>, <PHONE>, <IP> in place of personal data, {type: how many}).

    IBANs must pass mod 97 (ISO 13616), cards Luhn (ISO 7812); identity numbers need their label. Four small numbers,
    as in "under 12.4.1.3" or the version 3.5.0.1, are an IPv4 address only where something beside them says so.
    Addresses of networks, masks and the local machine stay: they name nobody.
    """
    counts = Counter()

    def replace_all(pattern, name, may_occur, find_personal=None):
        """Replace what `find_personal` finds in each match, by default the match; `may_occur` is a cheap test."""
        nonlocal text

        def replace(match):
            value = find_personal(match) if find_personal else match[0]
            if not value:
                return match[0]
            counts[name] += 1
            label = match[1] if pattern in (IDENTITY, LABELLED_PHONE, LABELLED_KEY) else ""
            return f"{label}<{name.upper()}>{match[0][len(value):] if pattern is IBAN else ''}"
        if may_occur:
            text = pattern.sub(replace, text)

    lower = text.lower()
    replace_all(PRIVATE_KEY, "key", "PRIVATE KEY" in text)
    replace_all(KEY, "key", any(mark in text for mark in KEY_MARKS))
    replace_all(LABELLED_KEY, "key", any(mark in lower for mark in ("key", "secret", "token", "password")))
    replace_all(EMAIL, "email", "@" in text, _find_email)
    replace_all(IDENTITY, "id", any(mark in lower for mark in IDENTITY_MARKS))
    # Each pattern but the last needs at least so many digits and signs.
    digits = re.search(r"\d[\d ().-]{5,}\d", text)
    replace_all(IBAN, "iban", digits, _find_iban)
    replace_all(CARD, "card", digits, lambda match: passes_luhn(match[0]) and match[0][0] in "23456" and match[0])
    replace_all(LABELLED_PHONE, "phone", digits)
    replace_all(PHONE, "phone", digits, _find_phone)
    replace_all(IP4, "ip", digits, _find_ip4)
    replace_all(IP6, "ip", "::" in text or text.count(":") > 6, _find_ip6)
    return text, dict(counts)


def _find_email(match):
    """The address, or "" for what looks alike in programs: matmuls, versions, units of systemd, file names."""
    local, _, host = match[0].partition("@")
    tld = host.rpartition(".")[2].lower()
    # Kotlin's labels, as in this@MainActivity.name.
    if local in ("this", "super", "return"):
        return ""
    newline = local == "n" and match.string[match.start() - 1:match.start()] == "\\"
    call = match.string[match.end():match.end() + 1] == "("
    code = newline or call or NO_TLD.fullmatch(tld) or len(local) == host.find(".") == 1 or CODE_HOST.match(host)
    return "" if code and not SURE_TLD.fullmatch(tld) else match[0]


def _find_iban(match):
    """The part of the match that is an IBAN, or "". The pattern also takes upper-case words behind it."""
    candidate = match[0]
    while len(candidate) > 14:
        letters = candidate.replace(" ", "")
        digits = "".join(str(int(c, 36)) for c in letters[4:] + letters[:4])
        if len(letters) == int(IBAN_LENGTH.get(letters[:2], 0)) and int(digits) % 97 == 1:
            return candidate
        candidate = candidate.rpartition(" ")[0]
    return ""


def passes_luhn(number: str) -> bool:
    """Luhn's check: every second digit from the right is doubled, and the sum of all digits is a multiple of 10."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    total = sum(digits[0::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return total > 0 and total % 10 == 0


def _find_phone(match):
    before = match.string[max(0, match.start() - 24):match.start()]
    return "" if NOT_PHONE.search(before) and not re.search(r"(?i)tel|phone|fax", before) else match[0]


def _find_ip4(match):
    text, start, end = match.string, match.start(), match.end()
    octets = [int(o) for o in match[0].split(".")]
    # This machine, multicast and reserved addresses, and networks name nobody.
    if octets[0] in (0, 127) or octets[0] > 223 or octets[3] == 0:
        return ""
    before, behind = text[max(0, start - 48):start], text[end:end + 48]
    near = IP4.findall(before + match[0] + behind)
    # The number of a clause seldom has two parts above 49, or one of three digits.
    says_so = (sum(o > 49 for o in octets) > 1 or any(int(o) > 99 for quad in near for o in quad.split("."))
               or before[-1:] + behind[:1] == "[]" or ADDRESS_BEHIND.match(behind)
               or (ADDRESS_SIGN.search(before, len(before) - 24) and ADDRESS_BEFORE.search(before)))
    # New Mexico's Administrative Code cites by four numbers.
    if not says_so or re.match(r"\(\w|\sNMAC\b", behind):
        return ""
    return "" if OUTLINE.search(text[max(0, start - 64):start]) else match[0]


def _find_ip6(match):
    # Paths of C++ and Rust, and times of day, are no addresses.
    if sum(bool(group) for group in match[0].split(":")) < 3 or not re.search(r"\d", match[0]):
        return ""
    try:
        return match[0] if ipaddress.IPv6Address(match[0]) else ""
    except ValueError:
        return ""
