"""Truth: naive loops in this file for the repetition scores; sentences in several languages; the formulas by hand."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from documents import CODE, NOTE, STATUTE, scores_of

from text import scores
from text.repair import split_text
from text.scores import estimate_log_odds, hash_features, score_ngrams


def naive_repetition(text: str) -> dict:
    """Gopher's n-gram shares as datatrove counts them, on strings."""
    words, out = text.split(), {}
    for n in (2, 3, 4):
        counts = Counter(" ".join(words[i:i + n]) for i in range(len(words) - n + 1))
        gram, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
        out[f"top_{n}gram"] = min(1.0, len(gram) * most / len(text)) if most > 1 else 0.0
    for n in range(5, 11):
        seen, chars, i = set(), 0, 0
        while i <= len(words) - n:
            gram = " ".join(words[i:i + n])
            if gram in seen:
                chars, i = chars + len(gram), i + n
            else:
                seen.add(gram)
                i += 1
        out[f"dup_{n}gram"] = chars / len(text)
    return out


def test_repetition_scores_match_the_naive_count():
    rng = random.Random(3)
    texts = [" ".join(rng.choice("abcdefgh"[:k]) * rng.randint(1, 3) for _ in range(n)) for k in (2, 3, 8)
             for n in (1, 4, 9, 60, 300)] + [STATUTE, NOTE, f"{NOTE} {NOTE}", " ".join([STATUTE[:200]] * 6)]
    for text in texts:
        words = text.split()
        found = score_ngrams(words, len(text))
        for name, value in naive_repetition(text).items():
            assert found[name] == pytest.approx(value), (name, text[:60])


def test_repeated_lines_and_paragraphs_by_hand():
    """Gopher's: every occurrence after the first, of all lines (of all characters). Five lines, of which "aa" stands
    three times: 2 of 5 lines, 4 of 17 characters."""
    found = scores.score_text("aa\nbb\n\naa\nbbb\n\naa")
    assert (found["lines"], found["chars"]) == (5, 17)
    assert (found["dup_lines"], found["dup_line_chars"]) == (0.4, round(4 / 17, 4))
    assert (found["dup_paragraphs"], found["dup_paragraph_chars"]) == (0, 0)
    found = scores.score_text("a b\n\na b\n\nc\n\na b")
    assert (found["dup_paragraphs"], found["dup_paragraph_chars"]) == (0.5, round(6 / 16, 4))


def test_unique_words_are_counted_in_windows_of_100():
    """A last window of 50 words or fewer does not count: it would be more unique than the others. Case is no matter."""
    once = [f"word{i}" for i in range(51)]
    for more, wanted in (([], 0.01), (once[:50], 0.01), (once, (0.01 + 1) / 2)):
        assert scores.score_text(" ".join(["law", "Law"] * 50 + more))["unique_words"] == round(wanted, 4), len(more)
    assert scores.score_text("THE END OF ALL")["stop_words"] == 2


# The first article of the Universal Declaration of Human Rights, or its first sentence.
RIGHTS = dict(line.split(" ", 1) for line in """
en All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.
de Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.
es Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia.
fr Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.
it Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza.
pt Todos os seres humanos nascem livres e iguais em dignidade e em direitos, dotados de razão e de consciência.
nl Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en geweten.
pl Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i sumieniem.
cs Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím.
sv Alla människor är födda fria och lika i värde och rättigheter. De har utrustats med förnuft och samvete.
da Alle mennesker er født frie og lige i værdighed og rettigheder. De er udstyret med fornuft og samvittighed.
ro Toate ființele umane se nasc libere și egale în demnitate și în drepturi. Ele sunt înzestrate cu rațiune.
hu Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek ésszel és lelkiismerettel bírnak.
fi Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja omatunto.
tr Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.
vi Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền, và được ban cho lý trí và lương tâm.
id Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama. Mereka dikaruniai akal dan hati nurani.
ru Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.
uk Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю.
bg Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест.
fa تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان هستند.
hi सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि की देन प्राप्त है।
zh 人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
ja すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられた。
ko 모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았다.
th มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม
""".strip().splitlines())


@pytest.mark.parametrize(("text", "language"), [
    (NOTE, "en"), ("Das Gericht hat den Antrag mit der Begründung abgelehnt, dass er nicht von der Partei ist.", "de"),
    ("Le tribunal est saisi par une des parties et la demande est jugée dans les deux mois.", "fr"),
    ("Суд рассматривает дело в течение двух месяцев.", "ru"), ("法院应当在两个月内作出判决。", "zh"),
    ("裁判所は二か月以内に判決を下す。", "ja"), ("12 34 56", "unknown"), ("", "unknown"),
    *((text, language) for language, text in RIGHTS.items()),
])
def test_language_by_script_and_stop_words_and_by_lingua(text, language):
    found = scores_of(text)
    assert found["language"] == language
    assert found["language_score"] > 0.2 or language == "unknown"
    if len(text) > 20:
        pytest.importorskip("lingua")
        # lingua takes Indonesian for Malay, which differs by few words.
        assert scores_of(text, lingua=True)["language"] in (language, {"id": "ms"}.get(language))


def test_a_single_sign_of_another_script_decides_nothing():
    for sign in ("の", "é の", "法", "Ω の"):
        assert scores_of(f"{NOTE} {sign}")["language"] == "en"
        assert scores_of(f"{RIGHTS['de']} {sign}")["language"] == "de"
        assert scores_of(f"12 34 {sign} $ € 56, Lithium Natrium Kalium Calcium")["language"] == "unknown"


def test_a_language_without_a_list_is_not_taken_for_one_that_shares_two_words():
    estonian = "Kõik inimesed sünnivad vabadena ja võrdsetena oma väärikuselt ja õigustelt. Neile on antud mõistus " * 2
    lithuanian = "Visi žmonės gimsta laisvi ir lygūs savo orumu ir teisėmis. Jiems suteiktas protas ir sąžinė. " * 6
    assert scores_of(lithuanian + "o a o")["language"] == "unknown", "o is frequent in Portuguese"
    assert "stop_words" not in scores_of(lithuanian)
    assert scores_of(estonian)["language"] in ("fi", "unknown")


def test_sentences_end_with_the_marks_of_their_script():
    for text in (RIGHTS["zh"], RIGHTS["hi"], RIGHTS["ja"], "ما هذا؟ كتاب.", "یہ کتاب ہے۔ وہ نہیں۔",
                 "他说：“走！”她走了。", "Er sagte: „Geh!“ Sie ging."):
        assert scores_of(text)["sentences"] == 2, text
    assert scores_of("Er sagte: „Sie ging.“\nIl dit : « Va. »\n他说：「走。」")["terminal_lines"] == 1
    thai = scores_of(RIGHTS["th"] * 3)
    assert not {"sentences", "terminal_lines", "mean_word_length"} & thai.keys()
    assert "mean_word_length" not in scores_of(RIGHTS["ko"])
    assert thai["format"] > 0.6
    assert split_text("他说：“我们走吧！”她走了，没有回来。", 10)[0] == "他说：“我们走吧！”"


def test_an_abbreviation_ends_no_sentence():
    german = ("Der Vertrag ist nach § 14 Abs. 2 Nr. 3 und Art. 6 der Verordnung, d. h. auf Antrag bzw. von Amts wegen, "
              "z. B. bei Verzug, nichtig. Das gilt auch für den Erben.")
    english = "Mr. J. R. Smith of the U.S. Army v. Dr. Lee, i.e. the plaintiff, is heard. It is so."
    for language, text in (("de", german), ("en", english)):
        assert (scores_of(text)["language"], scores_of(text)["sentences"]) == (language, 2)
    # An abbreviation that ends the text ends a sentence.
    assert scores_of("Das ist der erste Satz. Und das ist der zweite nach Art.")["sentences"] == 2


def test_repetition_without_spaces_is_counted_in_signs():
    for text in (RIGHTS["zh"] * 2, RIGHTS["ja"] + RIGHTS["zh"] + RIGHTS["ja"][5:], RIGHTS["th"] * 3, RIGHTS["zh"]):
        signs = re.findall(r"\w", text) if "人" in text else [sign for sign in text if "\u0e00" <= sign <= "\u0eff"]
        seen, repeated, i = set(), 0, 0
        while i <= len(signs) - 20:
            gram = "".join(signs[i:i + 20])
            if gram in seen:
                repeated, i = repeated + 20, i + 20
            else:
                seen.add(gram)
                i += 1
        assert scores_of(text)["dup_10gram"] == pytest.approx(repeated / len(text), abs=1e-4)


def test_scripts_without_spaces_count_signs_and_skip_rules_on_words():
    found = scores_of("法院应当在两个月内作出判决。" * 5)
    assert found["words"] == 5 * 13
    assert "mean_word_length" not in found
    assert "stop_words" not in found
    assert found["sentences"] == 5


def test_code_ratio_tells_text_from_code():
    assert scores_of(CODE, "code")["code_ratio"] > 0.6
    assert scores_of(STATUTE)["code_ratio"] == 0
    assert scores_of(NOTE)["code_ratio"] == 0
    assert 0.2 < scores_of(f"{NOTE}\n```\n{CODE}```", "medical")["code_ratio"] < 0.8


def test_relevance_by_keywords_and_by_log_odds():
    words = ("petition", "court", "adoption", "consent")
    assert scores_of(STATUTE, keywords=words)["relevance"] == 1
    found = scores_of(NOTE + " court", keywords=words)
    assert found["keyword_density"] == pytest.approx(1 / (len(NOTE.split()) + 1), abs=1e-4)
    assert scores_of(NOTE, keywords=("cou",))["keyword_density"] == 0, "whole words only"
    odds = estimate_log_odds([STATUTE], [NOTE])
    law, medicine = (scores_of(text, log_odds=odds) for text in (STATUTE[60:300], NOTE[60:300]))
    assert law["log_odds"] > 1 > -1 > medicine["log_odds"]
    assert law["relevance"] > 0.7 > 0.3 > medicine["relevance"]
    assert len(hash_features(["half", "\ud800"])) == 3
    one = estimate_log_odds(["a"], ["b"])                          # by hand: one word, no pair
    total = 1 + scores.BUCKETS / 2
    assert one[hash_features(["a"])[0]] == pytest.approx(np.log(1.5 / total) - np.log(0.5 / total), rel=1e-5)
