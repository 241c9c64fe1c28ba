//! Whether a text is one JSON value, as Python's `json.loads` decides it.
//!
//! `NaN` and the infinities are values there, a lone surrogate may stand behind `\u`, and a whole number
//! has at most 4300 digits. A stack of our own keeps deep texts off the thread's.

/// Digits that Python turns into a whole number.
const MOST_DIGITS: usize = 4300;

/// Whether `text` is one value with nothing but space around it.
pub(super) fn is_json(text: &str) -> bool {
    let mut reader = Reader { bytes: text.as_bytes(), at: 0 };
    reader.space();
    reader.document().is_some() && {
        reader.space();
        reader.at == reader.bytes.len()
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// What is open around a value.
#[derive(Clone, Copy, PartialEq)]
enum Open {
    List,
    Object,
}

impl Reader<'_> {
    /// Reads a value and all that is in it.
    fn document(&mut self) -> Option<()> {
        let mut open: Vec<Open> = Vec::new();
        loop {
            // A value begins here.
            let entered = match self.peek()? {
                b'[' => self.enter(Open::List, b']', &mut open),
                b'{' => self.enter(Open::Object, b'}', &mut open),
                _ => {
                    self.scalar()?;
                    false
                }
            };
            if entered {
                if open.last() == Some(&Open::Object) {
                    self.key()?;
                }
                continue;
            }
            // It has ended: what is open goes on, or ends with it.
            loop {
                let Some(around) = open.last().copied() else { return Some(()) };
                self.space();
                match (self.next()?, around) {
                    (b',', Open::List) => self.space(),
                    (b',', Open::Object) => {
                        self.space();
                        self.key()?;
                    }
                    (b']', Open::List) | (b'}', Open::Object) => {
                        open.pop();
                        continue;
                    }
                    _ => return None,
                }
                break;
            }
        }
    }

    /// Steps into a list or an object; one that is empty is over at once.
    fn enter(&mut self, kind: Open, end: u8, open: &mut Vec<Open>) -> bool {
        self.at += 1;
        self.space();
        if self.peek() == Some(end) {
            self.at += 1;
            return false;
        }
        open.push(kind);
        true
    }

    /// A key with its colon.
    fn key(&mut self) -> Option<()> {
        self.string()?;
        self.space();
        (self.next()? == b':').then(|| self.space())
    }

    fn scalar(&mut self) -> Option<()> {
        if self.peek()? == b'"' {
            return self.string();
        }
        let words = ["null", "true", "false", "NaN", "Infinity", "-Infinity"];
        for word in words {
            if self.bytes[self.at..].starts_with(word.as_bytes()) {
                self.at += word.len();
                return Some(());
            }
        }
        self.number()
    }

    fn string(&mut self) -> Option<()> {
        if self.next()? != b'"' {
            return None;
        }
        loop {
            match self.next()? {
                b'"' => return Some(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => {
                        for _ in 0..4 {
                            self.next()?.is_ascii_hexdigit().then_some(())?;
                        }
                    }
                    _ => return None,
                },
                0..0x20 => return None,
                _ => {}
            }
        }
    }

    fn number(&mut self) -> Option<()> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let whole = match self.peek()? {
            b'0' => {
                self.at += 1;
                1
            }
            _ => self.digits()?,
        };
        let mut is_whole = true;
        // What is no fraction or exponent is left for whoever reads on, and is refused there.
        let behind = |reader: &Self, ahead: usize| reader.bytes.get(reader.at + ahead).copied();
        if behind(self, 0) == Some(b'.') && behind(self, 1).is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
            self.digits()?;
            is_whole = false;
        }
        if matches!(behind(self, 0), Some(b'e' | b'E')) {
            let signed = usize::from(matches!(behind(self, 1), Some(b'+' | b'-')));
            if behind(self, 1 + signed).is_some_and(|b| b.is_ascii_digit()) {
                self.at += 1 + signed;
                self.digits()?;
                is_whole = false;
            }
        }
        (!is_whole || whole <= MOST_DIGITS).then_some(())
    }

    /// One digit or more; how many.
    fn digits(&mut self) -> Option<usize> {
        let count = self.bytes[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        (count > 0).then_some(count)
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_what_python_takes_for_it() {
        let good = [
            "{}",
            "[]",
            "\"a\"",
            "0",
            "-0.5e+3",
            "NaN",
            "[-Infinity, Infinity]",
            "{\"a\": [1, {\"b\": null}]}",
            " [1 , 2\n]\t",
            "\"\\ud800\"",
            "1e999",
            "{\"a\":1,\"a\":2}",
            "\"\u{7f}é\"",
        ];
        for text in good {
            assert!(is_json(text), "{text}");
        }
        let bad = [
            "",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "{a:1}",
            "{'a':1}",
            "01",
            "-",
            "1.",
            ".5",
            "1e",
            "nan",
            "True",
            "\"a\nb\"",
            "\"\\x\"",
            "\"\\u12g4\"",
            "[1] 2",
            "{\"a\" 1}",
            "[1 2]",
            "\u{feff}{}",
            "\u{a0}1",
            "[}",
            "-NaN",
        ];
        for text in bad {
            assert!(!is_json(text), "{text}");
        }
    }

    #[test]
    fn depth_costs_no_stack_and_numbers_have_an_end() {
        let deep = 200_000;
        assert!(is_json(&format!("{}{}", "[".repeat(deep), "]".repeat(deep))));
        assert!(!is_json(&"[{\"a\":".repeat(deep)));
        assert!(is_json(&"1".repeat(4300)) && !is_json(&"1".repeat(4301)));
        assert!(is_json(&format!("{}.0", "1".repeat(5000))));
    }
}
