"""What the reference implementation of IFEval says of made-up answers: tests/golden/ifeval.jsonl.

    pip install lm_eval langdetect immutabledict nltk      # and NLTK's punkt_tab (NLTK_DATA)
    python tests/golden/ifeval.py tests/golden/ifeval.jsonl
    python tests/golden/ifeval.py big.jsonl --count 100000 --seed 1 --texts text.json   # by hand
    python tests/golden/ifeval.py --punkt NLTK_DATA/tokenizers/punkt_tab/english src/task/ifeval/punkt.txt

A line is {"a": answer, "i": [[name, keys], ...], "s": "0110", "l": "1110"}: strict and loose, a digit for each
instruction. Languages are left out, since the reference guesses them at random: an instruction on letters'
case is kept only where its other half decides.
"""
import argparse
import json
import random
import sys

WORDS = """the a of and to in it is was dog cat house river stone bright quick slowly runs Paris Monday Lily John
data model answer question because however although Mr Dr example point first second I we they don't isn't it's
cannot gonna wanna got gimme yes no maybe story key step CAPITAL WORDS NASA U.S. naïve café über Straße word""".split()
ENDS = [".", ".", ".", ".", "!", "?", "...", "?!", ".)", '."', ".”", ":", ";", "…", ". . .", ".'", "!!!", ".]", ".--"]
SNIPPETS = [
    "***", "****", "******", "*****", " *** ", "\n***\n", "\n\n***\n\n", "\n******\n", "*", "**", "\n\n", "\n", "\n\n\n",
    "\n* item", "\n - item", "\n** item", "\n*\n", "\n-", "\n  * a, b", "* *", "*hi*", "**bold text**", "***both***", "**a*",
    "*a\nb*", "** **", "[name]", "[[a] b]", "[\n]", "[]", "[a][b]", "]x[", "<<title>>", "<<>>", "<< >>", "<<<a>>>", "<<a\nb>>",
    "<a>", "P.S.", "P. S.", "p.s.", "P.S", "P.P.S", "P. P. S.", "p.p.s", "PS:", "Section 1", "SECTION 2", "Section3",
    " SECTION  4 ", "Section x", "Section ٣", "Day 1", "“Hello.” he", "‘So.’ It", "«Oui.» Non", "’", "it’s", "\"", "''", "``", "'",
    "\"Why?\" he asked.", "e.g. this", "i.e. That", "Dr. Smith", "Mr. X.", "U.S. The", "U.S. dollar", "J. Bach", "A. The", "I. he",
    "3.5", "No. 5.", "vs. them", "etc. And", "5 p.m. We", "a.m. it", "Inc. said", "Co. He", "$3.50.", "1. One", "2. two", "10.Then",
    "St. Louis", "Jan. 5", "Ph.D. He", "...and", "... And", ".. So", ".", "?", "!", ",", ", ", ";", ":", "--", "—", "–", "-", "_",
    "CANNOT", "GONNA", "GİMME", "GOTTA", "WANNA go", "LEMME", "MORE'N", "D'YE", "'TIS", " 'TWAS", " 'Tis", "DON'T", "I'M", "HE'LL", "'S",
    "CAN'T", "ROCK'N'ROLL", "'90S", "A&B", "#TAG", "50%", "C++", "@ME", "X:Y", "A,B", "1,000", "(ABC)", "{X}", "ÄÖ", "ẞ",
    "\x1c", "\x1f", "\u3000", "\u2028", "\x85", "\xa0", "\t", "\r\n", "\v", "e\u0301", "\u0301", "ǅ", "İ", "ı", "K", "ſ", "²", "½", "①", "Ⅷ",
    "हिन्दी", "中文。", "日本", "สวัสดี", "Привет.", "😀", "👩\u200d👩", "ΟΔΟΣ", "ﬁ", "\ufeff", "\u200b", "\xad", "_a_",
    "```json", "```", "```JSON\n", "{\"a\": 1}", "{'a': 1}", "[1, 2]", "NaN", "null", "\"text\"", "My answer is yes.",
    "My answer is no", "My answer is maybe.", "Is there anything else I can help with?", "Any other questions?", "# Title\n",
    "Sure, here it is:\n", "\nHope that helps!", "keyword", "KEYWORDS", "key-word", "stepstone", "step.", "Step", "dog's", "dogs",
]
KEYWORDS = ["dog", "cat", "key", "step", "story", "word", "kiwi", "is", "it", "I", "the", "café", "Straße", "naïve", "U.S.", "e.g.", "C..",
            "first second", "i", "s", "ß", "K", "don't", "रे", "日", "[ab]c", "a|b", "\\d", "d.g", "über"]
LANGUAGES = ["en", "de", "hi", "vi", "sw"]


def sentence(rng):
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
    if rng.random() < 0.8:
        words[0] = words[0][:1].upper() + words[0][1:]
    if rng.random() < 0.2:
        words.insert(rng.randrange(len(words)), rng.choice(SNIPPETS))
    if rng.random() < 0.3:
        words[rng.randrange(len(words))] += ","
    return " ".join(words) + rng.choice(ENDS)


def text(rng, texts):
    if texts and rng.random() < 0.6:
        whole = rng.choice(texts)
        start = rng.randrange(max(1, len(whole) - 200))
        base = whole[start:start + rng.randint(1, 700)]
    else:
        base = ""
        for _ in range(rng.choice([0, 1, 1, 2, 3, 5, 8])):
            base += sentence(rng) + rng.choice([" ", " ", " ", "  ", "\n", "\n\n", "\n\n", ""])
    for _ in range(rng.choice([0, 0, 1, 2, 4, 8, 16])):
        at = rng.randint(0, len(base))
        kind = rng.random()
        if kind < 0.75:
            base = base[:at] + rng.choice(SNIPPETS) + base[at:]
        elif kind < 0.9:
            base = base[:at] + base[at + rng.randint(1, 10):]
        else:
            base = base[:at] + rng.choice([" ", "\n", "\n\n", " "]) + base[at:]
    kind = rng.random()
    if kind < 0.05:
        base = base.upper()
    elif kind < 0.1:
        base = base.lower()
    elif kind < 0.13:
        base = base.title()
    elif kind < 0.17:
        base = '"' + base + '"' + rng.choice(["", "\n", ".", " "])
    elif kind < 0.2:
        base = base + rng.choice(["******", "\n******\n", "******\n******", "*******"]) + rng.choice([base, sentence(rng), ""])
    elif kind < 0.24:
        base = structure(rng, base)
    elif kind < 0.26:
        base = rng.choice(["", " ", "\n", "\x1c", "*", "**\n**", "\n\n", "\"", ".", "-"]) + rng.choice(["", "\n", "*", " "])
    elif kind < 0.3:
        base = rng.choice(["***", "\n"]).join(sentence(rng) for _ in range(rng.randint(1, 7)))
    return base


def structure(rng, base):
    """JSON, or almost."""
    value = rng.choice([{"a": base, "b": [1, 2.5, None, True]}, [base], base, 12, {}, [], [[]], {"x": {"y": []}}, -0.5, 1e300])
    whole = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
    if rng.random() < 0.3:
        at = rng.randint(0, len(whole))
        whole = whole[:at] + rng.choice([",", "}", "]", "\"", "\\", "\n", "NaN", "-Infinity", "01", "\\ud800", " ", "'", ".", "e5"]) + whole[at:]
    before, behind = rng.choice([("", ""), ("```json\n", "\n```"), ("```", "```"), ("```Json", "```"), ("```JSON ", " ```"), ("```json```", ""),
                                 ("~~~\n", "\n~~~"), ("Here:\n```\n", "\n```"), ("```\n", "\n```\nDone."), ("\ufeff", ""), (" \x1c", "\xa0")])
    return before + whole + behind


def near(rng, count):
    return max(0, count + rng.choice([-1, 0, 0, 1]))


def instructions(rng, answer, tools):
    relation = lambda: rng.choice(["less than", "at least"])
    word = lambda: rng.choice(KEYWORDS + (answer.split()[:50] or ["x"]) if rng.random() < 0.3 else KEYWORDS)
    literal = lambda w: w if w in KEYWORDS else "".join(c for c in w if c.isalnum()) or "dog"
    letter = rng.choice("abcdefghijklmnopqrstuvwxyzABCI")
    wide = lambda pattern: len(tools.re.findall(pattern, answer))
    one = {
        "keywords:existence": lambda: {"keywords": [literal(word()) for _ in range(rng.randint(1, 3))]},
        "keywords:frequency": lambda: (lambda w: {"keyword": rng.choice([w, " " + w]), "relation": relation(),
                                                 "frequency": near(rng, len(tools.re.findall(w, answer, tools.re.I)))})(literal(word())),
        "keywords:forbidden_words": lambda: {"forbidden_words": [literal(word()) for _ in range(rng.randint(1, 2))]},
        "keywords:letter_frequency": lambda: {"letter": letter, "let_relation": relation(),
                                              "let_frequency": near(rng, answer.lower().count(letter.lower()))},
        "length_constraints:number_sentences": lambda: {"relation": relation(), "num_sentences": near(rng, tools.util.count_sentences(answer))},
        "length_constraints:number_paragraphs": lambda: {"num_paragraphs": near(rng, wide(r"\*\*\*") + 1)},
        "length_constraints:number_words": lambda: {"relation": relation(), "num_words": near(rng, tools.util.count_words(answer))},
        "length_constraints:nth_paragraph_first_word": lambda: first_word(rng, answer),
        "detectable_content:number_placeholders": lambda: {"num_placeholders": near(rng, wide(r"\[.*?\]"))},
        "detectable_content:postscript": lambda: {"postscript_marker": rng.choice(["P.S.", "P.P.S", "P.S.", "P.P.S", "PS:", " P.S. "])},
        "detectable_format:number_bullet_lists": lambda: {"num_bullets": near(rng, wide(r"(?m)^\s*[*-]"))},
        "detectable_format:constrained_response": dict,
        "detectable_format:number_highlighted_sections": lambda: {"num_highlights": near(rng, wide(r"\*[^*\n]+\*"))},
        "detectable_format:multiple_sections": lambda: {"section_spliter": rng.choice(["Section", "SECTION", "Day", " Section "]),
                                                        "num_sections": rng.randint(1, 3)},
        "detectable_format:json_format": dict,
        "detectable_format:title": dict,
        "combination:two_responses": dict,
        "combination:repeat_prompt": lambda: {"prompt_to_repeat": rng.choice([answer[:rng.randint(1, 40)].swapcase(), "The dog", "Write a story."])},
        "startend:end_checker": lambda: {"end_phrase": rng.choice([answer[-rng.randint(1, 20):].swapcase(), "Any other questions?",
                                                                  "Is there anything else I can help with?", "."])},
        "startend:quotation": dict,
        "change_case:capital_word_frequency": lambda: {"capital_relation": relation(), "capital_frequency":
                                                       near(rng, sum(w.isupper() for w in tools.nltk.word_tokenize(answer)))},
        "change_case:english_capital": dict,
        "change_case:english_lowercase": dict,
        "punctuation:no_comma": dict,
    }
    for name, make in one.items():
        keys = make()
        # The reference takes zero and nothing for absent, and draws what it likes.
        if all(keys.values()) and not any(isinstance(v, str) and not v.strip() for v in keys.values()):
            yield name, keys


def first_word(rng, answer):
    parts = answer.split("\n\n")
    count = near(rng, sum(bool(p.strip()) for p in parts)) or 1
    nth = rng.randint(1, count)
    words = parts[min(nth, len(parts)) - 1].split()
    word = words[0].strip("\"'.,!?") if words else "the"
    return {"num_paragraphs": count, "nth_paragraph": nth, "first_word": rng.choice([word.swapcase(), word, "the"]) or "x"}


class Tools:
    def __init__(self):
        import re
        import nltk
        from lm_eval.tasks.ifeval import instructions_util, utils
        import langdetect
        self.re, self.nltk, self.util, self.utils = re, nltk, instructions_util, utils
        # Case counts as followed only with a language, which is not compared: let all be English.
        langdetect.detect = lambda _: "en"

    def says(self, pairs, answer):
        row = self.utils.InputExample(0, [name for name, _ in pairs], "prompt", [keys for _, keys in pairs])
        strict = self.utils.test_instruction_following_strict(row, answer).follow_instruction_list
        loose = self.utils.test_instruction_following_loose(row, answer).follow_instruction_list
        return ["".join("01"[bool(one)] for one in all) for all in (strict, loose)]


def punkt(source, target):
    """Of NLTK's parameters, what a decision can depend on."""
    read = lambda name: [l for l in open(f"{source}/{name}", encoding="utf-8", newline="\n").read().split("\n") if l]
    lower, middle_upper, upper, begin_lower = 112, 4, 14, 16
    classes = {"upper_starts": [], "either": [], "upper_inside": []}
    for line in read("ortho_context.tab"):
        word, flags = line.split("\t")
        flags = int(flags)
        if not flags & lower:
            continue
        if flags & middle_upper:
            classes["upper_inside"].append(word)
        elif flags & upper or not flags & begin_lower:
            classes["upper_starts"].append(word)
        else:
            classes["either"].append(word)
    sections = {"abbreviations": read("abbrev_types.txt"), "collocations": read("collocations.tab"),
                "starters": read("sent_starters.txt"), **classes}
    with open(target, "w", encoding="utf-8", newline="\n") as out:
        for name, words in sections.items():
            out.write(f"[{name}]\n" + "".join(word + "\n" for word in sorted(words)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="?")
    parser.add_argument("--count", type=int, default=330)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--keep", type=float, default=0.22, help="share of the instructions asked of an answer")
    parser.add_argument("--punkt", nargs=2)
    args = parser.parse_args()
    if args.punkt:
        return punkt(*args.punkt)
    texts = []
    for path in args.texts:
        whole = open(path, encoding="utf-8").read()
        try:
            texts += json.loads(whole)
        except json.JSONDecodeError:
            texts += [json.loads(l)["text"] for l in whole.split("\n") if l] if whole[0] == "{" else whole.split("\n\n")
    tools = Tools()
    rng = random.Random(args.seed)
    checks = 0
    with open(args.output, "w", encoding="utf-8", newline="\n") as out:
        for _ in range(args.count):
            answer = text(rng, texts)
            pairs = [pair for pair in instructions(rng, answer, tools) if rng.random() < args.keep]
            rng.shuffle(pairs)
            try:
                strict, loose = tools.says(pairs, answer)
            except RecursionError:
                continue
            kept = [k for k, (name, _) in enumerate(pairs) if "english" not in name or loose[k] == "0"]
            pairs, strict, loose = [pairs[k] for k in kept], *("".join(all[k] for k in kept) for all in (strict, loose))
            checks += len(pairs)
            row = {"a": answer, "i": pairs, "s": strict, "l": loose}
            out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{args.count} answers, {checks} checks", file=sys.stderr)


if __name__ == "__main__":
    main()
