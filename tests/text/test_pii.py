"""Cases made by hand from legal, medical and code texts, both ways; Luhn and mod 97 by their definitions."""

import random
from importlib import resources

import pytest
from growth import assert_linear

from text import pii
from text.pii import scrub


@pytest.mark.parametrize(("text", "wanted"), [
    ("write to jane.doe+law@hospital.example today.", "write to <EMAIL> today."),
    ("author = 'J. Doe <j_doe@mit.edu>'", "author = 'J. Doe <<EMAIL>>'"),
    ("call +1 415-555-0132 or (202) 555-0147.", "call <PHONE> or <PHONE>."),
    ("patient's mobile +49 30 901820, +442079460018", "patient's mobile <PHONE>, <PHONE>"),
    ("Tel. no.: 020 7946 0018; fax 7946 0019", "Tel. no.: <PHONE>; fax <PHONE>"),
    ("j.doe@startup.tech, bob@firm.xyz, ann@shop.store.", "<EMAIL>, <EMAIL>, <EMAIL>."),
    ("mail max@4you.at, a@b.org, x@firm.com(work) and b@7.Biz", "mail <EMAIL>, <EMAIL>, <EMAIL>(work) and <EMAIL>"),
    ("(415) 555 0132, (415) 555-0132, 1 (415) 555.0132", "<PHONE>, <PHONE>, <PHONE>"),
    ("call 415 555 0132, reach me at 415 555 0132; ph: 415 555 0132; call her at 4155550132; dial 0800 1234567",
     "call <PHONE>, reach me at <PHONE>; ph: <PHONE>; call her at <PHONE>; dial <PHONE>"),
    ("telefax 7946 0018, mobile number is 07700 900123, cell: 07700 900123, hotline 0800 123 4567, helpline 0800 12345",
     "telefax <PHONE>, mobile number is <PHONE>, cell: <PHONE>, hotline <PHONE>, helpline <PHONE>"),
    ("from 203.0.113.9: refused. Then 8.8.8.8.", "from <IP>: refused. Then <IP>."),
    ("a\n66.24.69.97 User logged in\n10.20.30.40 GET / HTTP", "a\n<IP> User logged in\n<IP> GET / HTTP"),
    ('10.2.3.4 - - [10/Oct/2000:13:55:36] "GET / HTTP/1.0"', '<IP> - - [10/Oct/2000:13:55:36] "GET / HTTP/1.0"'),
    ("Jan 1 10:11:12 10.2.3.4 sshd: login from 10.2.3.5, root at 10.2.3.6",
     "Jan 1 10:11:12 <IP> sshd: login from <IP>, root at <IP>"),
    ("for bob from 10.2.3.4 port 22; 10.2.3.4 bob logged out; 10.2.3.4 timed out",
     "for bob from <IP> port 22; <IP> bob logged out; <IP> timed out"),
    ("http://10.2.3.4/x, ssh bob@10.2.3.4, ::ffff:10.2.3.4, 10.2.3.4:8080, [10.2.3.4], 10.2.3.4/24",
     "http://<IP>/x, ssh bob@<IP>, ::ffff:<IP>, <IP>:8080, [<IP>], <IP>/24"),
    ("IP 10.2.3.4; the server is 10.2.3.4; Host: 10.2.3.4; ping 10.2.3.4; client 10.2.3.4",
     "IP <IP>; the server is <IP>; Host: <IP>; ping <IP>; client <IP>"),
    ("hosts 10.2.3.4, 10.2.3.5 and 10.2.3.6; address 10.2.3.4", "hosts <IP>, <IP> and <IP>; address <IP>"),
    ("{'ip': '10.2.3.4', 'IP Address', '10.2.3.5'}; sourceIp=10.2.3.4 <ip>10.2.3.4</ip>",
     "{'ip': '<IP>', 'IP Address', '<IP>'}; sourceIp=<IP> <ip><IP></ip>"),
    ("s.connect(('99.255.1.2', 1)); IPv4Address('1.2.3.4') > ip_address(\"1.2.3.5\")",
     "s.connect(('<IP>', 1)); IPv4Address('<IP>') > ip_address(\"<IP>\")"),
    ("66.24.69.97 is down; fe80::1ff:fe23:4567:890a 10.2.3.4", "<IP> is down; <IP> 10.2.3.4"),
    ("249.1.1.1 is reserved, 223.255.249.199, 9.99.9.100", "249.1.1.1 is reserved, <IP>, <IP>"),
    ("192.168.10.7 is down", "<IP> is down"),
    ("peer 2001:db8:0:1:1:1:1:1 and fe80::1ff:fe23:4567:890a", "peer <IP> and <IP>"),
    ("pay DE89 3704 0044 0532 0130 00 AND sign", "pay <IBAN> AND sign"),
    ("GB82WEST12345698765432, NO9386011117947", "<IBAN>, <IBAN>"),
    ("card 4111 1111 1111 1111, 5500-0000-0000-0004, 378282246310005", "card <CARD>, <CARD>, <CARD>"),
    ("3056 930902 5904 and 6011111111111117", "<CARD> and <CARD>"),
    ("SSN: 123-45-6789; social security number 123456789", "SSN: <ID>; social security number <ID>"),
    ("MRN 00123456 and NHS number 943 476 5919", "MRN <ID> and NHS number <ID>"),
    ("National Insurance No. QQ 12 34 56 C, passport number X1234567",
     "National Insurance No. <ID>, passport number <ID>"),
    ("NINO QQ123456C, medical record no. 00123456, taxpayer identification 12-3456789",
     "NINO <ID>, medical record no. <ID>, taxpayer identification <ID>"),
    ("patient id: 00123456, driver's license number D1234567", "patient id: <ID>, driver's license number <ID>"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIB+x/\n-----END RSA PRIVATE KEY-----\nend", "<KEY>\nend"),
    ('api_key: "0123456789abcdef0123456789abcdef"', 'api_key: "<KEY>"'),
    ("password='0123456789abcdef01234567', 'secret': 'abcdef/+-0123456789abcdef'",
     "password='<KEY>', 'secret': '<KEY>'"),
])
def test_personal_data_is_replaced_by_its_type(text, wanted):
    found, counts = scrub(text)
    assert found == wanted
    assert sum(counts.values()) == sum(wanted.count(f"<{name.upper()}>") for name in counts)
    assert scrub(found) == (found, {}), "placeholders are no personal data"


@pytest.mark.parametrize("text", [
    "Section 12.4.1.3 applies; see Clause 22.10.3.15(b), Sections 12.4.1.3 and 12.4.1.4, § 1.2.3.4 and Art. 5.1.2.3",
    "12.4.1.3 Definitions\n(1) In this part", "§ 16-2301 (2009); No. 202-555-0147; Docket 212-555-1234",
    "410 U.S. 113, 93 S. Ct. 705, 35 L. Ed. 2d 147 (1973)", "28:9-102(a)(52), 15 U.S.C. § 78u-4(b)(2)",
    "162/95 mmHg, 0.25 mg, 12,345 patients, p = 0.0001234567", "ISBN 978-3-16-148410-0, PMID 12345678, NCT01234567",
    "ICD-10 E11.65; EC 3.4.21.62 and OID 1.2.840.113549.1.1", "10.1016/j.cell.2010.01.001; Cell 2010 140 1234",
    "at 12:30:45 on 2001-02-03", "networks 192.0.2.0/24 and 224.0.0.1",
    "See 12.4.1.3 above, under 12.4.1.3, the", "paragraph (a) of 10.2.3.4 and 12.4.1.3 applies", "12.4.1.3 applies",
    "pursuant to 12.4.1.3, from 12.4.1.3 to 12.4.1.9 (see 12.4.1.3)", "the Client under 12.4.1.3; servers in 12.4.1.3",
    "notice to that address\n12.4.1.3 The Host shall comply with 12.4.1.3 - Definitions", "MEMBERSHIP 12.4.1.3 Fees",
    ".. deprecated:: 1.2.3.4", "chrome @ 1.2.3.4", "Clients\n12.4.1.3 The firm", "the addresses of 12.4.1.3",
    "the client equipment and 12.4.1.3 apply", "20.2.72.200 NMAC", "Rule 112.4.1.3, 160.103.2.4(b)",
    "the enzyme 3.4.21.62, group 2.16.8.1 and grade 1.2.3.4 toxicity", "__version__ = '3.5.0.1'  # 8.2.4.44 Bogus",
    'ObjectIdentifier("2.5.29.15")', "// 15.4.4.14 Array.prototype", "99.256.1.1, 300.168.1.1, IP 1.1.01.1",
    "0.100.1.1 and 10.100.1.1.5", "version 1.2.3.4, v1.2.3.4, pkg-1.2.3.4",
    "bind 127.0.0.1, 0.0.0.0 and mask 255.255.255.0",
    "y = a@b.T + x@self.weight", "x@self.weight + L@D@L.conjugate().T, q@k.mT, hidden@layer.weight, v@w.to(device)",
    "'\\n@click.command'", "icon@2x.png, photo@home.jpg", "left-pad@1.3.tgz, pkg@v2.0.0-rc.beta", "getty@tty1.service",
    "this@MainActivity.name", "hidden@layer.dot(x), x@w.to", "@media.print, @ firm.tech", "a@b, a@b.c",
    "4.359 744 722 2071 e-18 and 483 597.8525", "415 555 0132", "12 (415) 300",
    "call on 12/12/2012, call 12/12/2012 or 2012-12-12, fax 2012-12-12",
    "std::vector<int>::size, a::b::c, ::", "git@github.com:org/repo.git", "@app.route('/x')", "x = +1.23456789012",
    "4111 1111 1111 1112 and 1234567890123456", "9111 1111 1111 1110 and 1111-1111-1111-1117",
    "DE89 3704 0044 0532 0130 01", "token = os.environ['TOKEN']",
    "the social security act of 1935; patient 12 of 40", "skip-link sk-learn AKIA", "2**52 == 4503599627370496",
])
def test_text_that_only_looks_like_personal_data_survives(text):
    assert scrub(text) == (text, {})


def test_luhn_and_mod_97_agree_with_their_definitions():
    rng = random.Random(0)
    for _ in range(200):
        body = "4" + "".join(rng.choice("0123456789") for _ in range(14))
        good = [d for d in "0123456789" if scrub(body + d)[0] == "<CARD>"]
        doubled = sum(sum(map(int, str(2 * int(c)))) if i % 2 == 0 else int(c) for i, c in enumerate(body))
        assert good == [str(-doubled % 10)]
        account = "".join(rng.choice("0123456789") for _ in range(18))
        check = 98 - int(account + "131400") % 97                 # D = 13, E = 14
        assert scrub(f"DE{check:02d}{account}")[0] == "<IBAN>"
        assert scrub(f"DE{(check + 1) % 97:02d}{account}")[0] != "<IBAN>"


def test_every_top_level_domain_ends_an_address():
    """The list that IANA publishes, as hypothesis has it."""
    file = resources.files("hypothesis.vendor").joinpath("tlds-alpha-by-domain.txt")
    domains = [line for line in file.read_text().split() if line.isupper() and line.isascii()][1:]
    assert len(domains) > 1000
    for name in domains + [name.lower() for name in domains]:
        assert scrub(f"jo@firm.{name}.") == ("<EMAIL>.", {"email": 1}), name
    assert not [name for name in domains if pii.NO_TLD.fullmatch(name.lower())]


KEYS = {"AKIA": "AKIAIOSFODNN7EXAMPLE", "ASIA": "ASIAIOSFODNN7EXAMPLE",
        **{f"gh{kind}_": f"gh{kind}_" + "a1B2c3" * 6 for kind in "pousr"},
        "github_pat_": "github_pat_" + "a1B2_6" * 3 + "a1B2", "glpat-": "glpat-" + "a1B_-" * 4,
        "xox": "xoxb-" + "12-aB" * 2, "AIza": "AIza" + "Sy-_9" * 7, "hf_": "hf_" + "aB" * 17,
        "npm_": "npm_" + "a1B2c3" * 6, "sk_live_": "sk_live_" + "a1B2" * 6, "sk-": "sk-" + "a1B2" * 8,
        "eyJ": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMj.dozjgNryP4"}


def test_no_mark_of_a_key_is_in_plain_english():
    text = "Through the night the highest court weighed the rights of eight neighbours, though little came to light."
    assert not [mark for mark in pii.KEY_MARKS if mark in text + text.lower()]


@pytest.mark.parametrize("mark", pii.KEY_MARKS)
def test_every_kind_of_key_is_found(mark):
    key = KEYS[mark]                            # the shortest of its kind
    assert scrub(f"T={key}\nU='{key}'") == ("T=<KEY>\nU='<KEY>'", {"key": 2})
    for text in (key[:-1], f"a{key}", "_" + key[1:]):
        assert scrub(text) == (text, {})


def test_variants_of_keys():
    for text in (*(f"gh{c}_" + "a1B2c3" * 6 for c in "pousr"), *(f"xox{c}-0123456789" for c in "abprs"),
                 "sk-proj-" + "a1B_" * 8, "sk-ant-" + "a1B-" * 7 + "a1B2", "-----BEGIN PRIVATE KEY-----\nMIIB"):
        assert scrub(text) == ("<KEY>", {"key": 1})


@pytest.mark.parametrize("unit", ["a@b.c.", "a@", "a@a.a(", "1.1.1.1 ", "66.66.66.66 ", "host 1.1.1.1, ", "1.1.1.1:",
                                  "[1.1.1.1", "1.1.1.1 a ", "a:", "::", "@", "ip ", "ip\"' ", "(415) ", "call me at ",
                                  "reach ", "10:10:10 ", "xn--", "eyJa", "AIza", "1.1.1.1, ",
                                  "-----BEGIN PRIVATE KEY-----"])
def test_patterns_are_linear(unit):
    assert_linear(lambda n: scrub(unit * (n // len(unit))), 250_000)


def test_statutes_and_abstracts_have_no_addresses(data_dir):
    """What the DC Code and PubMed's abstracts hold in digits are sections, measures and dates."""
    for text in ((data_dir / "corpora/legal_en_dc/dc_code_title28.txt").read_text(),
                 (data_dir / "corpora/medical_pubmedqa/ori_pqal.json").read_text()):
        assert scrub(text)[1] == {}
