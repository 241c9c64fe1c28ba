//! Whether a text is in a language that an instruction names.
//!
//! The reference asks `langdetect`, which draws n-grams at random and so may answer differently each time.
//! Here `whatlang` answers, always the same way, among the languages that both know, so that Dutch is not
//! taken for German. Swahili, which `whatlang` does not know, is told by its commonest words. How often
//! the two agree is in docs/evaluation.md.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use whatlang::{Detector, Lang};

/// ISO 639-1, and what it is called in `whatlang`. The first lines are IFEval's own, Swahili aside.
#[rustfmt::skip]
const LANGUAGES: &[(&str, Lang)] = &[
    ("en", Lang::Eng), ("es", Lang::Spa), ("pt", Lang::Por), ("ar", Lang::Ara), ("hi", Lang::Hin), ("fr", Lang::Fra),
    ("ru", Lang::Rus), ("de", Lang::Deu), ("ja", Lang::Jpn), ("it", Lang::Ita), ("bn", Lang::Ben), ("uk", Lang::Ukr),
    ("th", Lang::Tha), ("ur", Lang::Urd), ("ta", Lang::Tam), ("te", Lang::Tel), ("bg", Lang::Bul), ("ko", Lang::Kor),
    ("pl", Lang::Pol), ("he", Lang::Heb), ("fa", Lang::Pes), ("vi", Lang::Vie), ("ne", Lang::Nep), ("kn", Lang::Kan),
    ("mr", Lang::Mar), ("gu", Lang::Guj), ("pa", Lang::Pan), ("ml", Lang::Mal), ("fi", Lang::Fin),
    ("af", Lang::Afr), ("ca", Lang::Cat), ("cs", Lang::Ces), ("da", Lang::Dan), ("el", Lang::Ell), ("et", Lang::Est),
    ("hr", Lang::Hrv), ("hu", Lang::Hun), ("id", Lang::Ind), ("lt", Lang::Lit), ("lv", Lang::Lav), ("mk", Lang::Mkd),
    ("nl", Lang::Nld), ("no", Lang::Nob), ("ro", Lang::Ron), ("sk", Lang::Slk), ("sl", Lang::Slv), ("sv", Lang::Swe),
    ("tl", Lang::Tgl), ("tr", Lang::Tur), ("zh", Lang::Cmn),
];

const SWAHILI: &str = "sw";
/// Short words of Swahili that hardly any text does without.
const SWAHILI_WORDS: &str = "ya wa kwa ni na za cha vya katika kama hii hiyo huu hizi huo yako yake wake \
    lakini au bila kila pia sana mtu watu ili hakuna kuwa tafadhali unaweza ambayo ambao ambapo wakati siku \
    moja mbili baada kabla hapa hivyo yao wao wetu yetu yangu wangu yenye wenye kutoka hadi kwenye si sio \
    hili hilo tu hata bado kuhusu ndani nini";
/// The least share of them among the words of a Swahili text, where texts of other languages end.
const SWAHILI_SHARE: f64 = 0.1;

/// Whether a code is one that [`is_in`] can answer for.
pub(super) fn is_known(code: &str) -> bool {
    code == SWAHILI || LANGUAGES.iter().any(|(known, _)| *known == code)
}

/// Whether a text is in the language of a code. One without a letter is in any.
pub(super) fn is_in(text: &str, code: &str) -> bool {
    static DETECTOR: LazyLock<Detector> = LazyLock::new(|| {
        Detector::with_allowlist(LANGUAGES.iter().map(|(_, lang)| *lang).collect())
    });
    let text = text.to_lowercase();
    if is_swahili(&text) {
        return code == SWAHILI;
    }
    match DETECTOR.detect_lang(&text) {
        None => true,
        Some(found) => LANGUAGES.iter().any(|(known, lang)| *known == code && *lang == found),
    }
}

fn is_swahili(lower: &str) -> bool {
    let known: BTreeSet<&str> = SWAHILI_WORDS.split_whitespace().collect();
    let words = lower.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty());
    let (mut all, mut common) = (0, 0);
    let mut unlike = BTreeSet::new();
    for word in words {
        all += 1;
        if let Some(word) = known.get(word) {
            common += 1;
            unlike.insert(*word);
        }
    }
    unlike.len() > 1 && f64::from(common) >= SWAHILI_SHARE * f64::from(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn languages_of_one_script_are_told_apart() {
        let texts = [
            ("en", "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG, AND THEN IT SLEEPS UNDER A TREE."),
            (
                "de",
                "Der schnelle braune Fuchs springt über den faulen Hund und schläft dann unter einem Baum.",
            ),
            (
                "nl",
                "De snelle bruine vos springt over de luie hond en slaapt daarna onder een boom in het bos.",
            ),
            (
                "sw",
                "Mbweha mwepesi anaruka juu ya mbwa mvivu, halafu analala chini ya mti katika msitu wa karibu.",
            ),
            ("hi", "यह एक सरल उदाहरण है जो दिखाता है कि भाषा कैसे पहचानी जाती है।"),
            ("mr", "हे एक सोपे उदाहरण आहे जे भाषा कशी ओळखली जाते ते दाखवते आणि आम्ही ते वाचतो."),
            ("fa", "این یک مثال ساده است که نشان می‌دهد زبان چگونه شناسایی می‌شود."),
        ];
        for (code, text) in texts {
            assert!(is_known(code));
            let found: Vec<&str> =
                texts.iter().map(|(code, _)| *code).filter(|code| is_in(text, code)).collect();
            assert_eq!(found, [code], "{text}");
        }
        assert!(is_in("42 + 1 = 43!", "de") && !is_known("xx"));
    }
}
