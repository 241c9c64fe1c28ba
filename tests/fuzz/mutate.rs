//! Damage: what may happen to the bytes of a file by accident, and what somebody may forge.

use serde_json::{Map, Value};

/// Numbers at which a length, a count or an offset goes wrong.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    127,
    255,
    256,
    4095,
    4097,
    65_535,
    65_536,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    1 << 62,
    i64::MAX as u64,
    u64::MAX,
];

/// Texts where a text, or something else, is expected.
const TEXTS: [&str; 14] = [
    "",
    "../x",
    "/etc/hostname",
    "..",
    "a/b",
    "model.safetensors",
    "\u{0}",
    "\u{10ffff}é",
    "F32",
    "I64",
    "1e999",
    "fewbit",
    "{\"a\":",
    "ⅷ",
];

/// Random numbers that depend on a seed alone (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    fn number(&mut self) -> u64 {
        let shift = self.below(64);
        match self.below(4) {
            0 => self.next() >> shift,
            1 => self.pick(&NUMBERS).wrapping_sub(1),
            _ => *self.pick(&NUMBERS),
        }
    }
}

/// How the files of a target are built, beyond bytes.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Shape {
    /// Nothing is known.
    Bytes,
    /// One JSON document.
    Json,
    /// A JSON document on each line.
    Lines,
    /// Eight bytes of a length, a JSON document, values.
    Safetensors,
    /// Words and numbers.
    Text,
}

/// A damaged copy of `file`; `other` is a file of the same kind.
pub(crate) fn damaged(random: &mut Random, shape: Shape, file: &[u8], other: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    if shape == Shape::Bytes || random.below(3) == 0 {
        for _ in 0..=random.below(4) {
            of_bytes(random, &mut file, other);
        }
        return file;
    }
    match shape {
        Shape::Bytes => {}
        Shape::Json => file = of_json(random, &file),
        Shape::Lines => file = of_lines(random, &file),
        Shape::Safetensors => file = of_header(random, &file),
        Shape::Text => {
            for _ in 0..=random.below(3) {
                of_text(random, &mut file);
            }
        }
    }
    file
}

fn of_bytes(random: &mut Random, file: &mut Vec<u8>, other: &[u8]) {
    let at = random.below(file.len());
    let most = 1 << random.below(10);
    let length = 1 + random.below(most);
    let end = (at + length).min(file.len());
    match random.below(9) {
        0 | 1 if !file.is_empty() => file[at] ^= 1 << random.below(8),
        2 if !file.is_empty() => file[at] = random.next() as u8,
        3 => file.truncate(at),
        4 => {
            let new: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
            file.splice(at..at, new);
        }
        5 => {
            let copy = file[at..end].to_vec();
            file.splice(at..at, copy);
        }
        6 => {
            file.drain(at..end);
        }
        7 => {
            let wide = random.below(2) == 0;
            let bytes = random.number().to_le_bytes();
            let bytes = if wide { &bytes[..] } else { &bytes[..4] };
            // Fields of files lie at multiples of four more often than not.
            let at = if random.below(2) == 0 { at } else { at & !3 };
            for (old, new) in file.iter_mut().skip(at).zip(bytes) {
                *old = *new;
            }
        }
        _ => {
            let from = random.below(other.len());
            let to = (from + length).min(other.len());
            file.splice(at..end, other[from..to].iter().copied());
        }
    }
}

fn of_json(random: &mut Random, text: &[u8]) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(text) else {
        let mut file = text.to_vec();
        of_bytes(random, &mut file, text);
        return file;
    };
    let donor = value.clone();
    for _ in 0..=random.below(3) {
        change(random, &mut value, &donor);
    }
    let text = value.to_string();
    // What no document of `Value` can hold: a key twice, a deep nest, numbers beyond all types.
    match random.below(24) {
        0 => nested(random, &text, "[", "]"),
        1 => nested(random, &text, "{\"a\":", "}"),
        2 => text.replacen('{', "{\"model\": 1, \"weight_map\": 2,", 1),
        3 => text.replacen(':', ": 1e400, \"x\":", 1),
        4 => text.replacen('0', "0000000000000000000000000000000", 1),
        5 => text.replacen('1', "-1e-400", 1),
        _ => text,
    }
    .into_bytes()
}

fn nested(random: &mut Random, text: &str, open: &str, close: &str) -> String {
    let depth = 1 << random.below(16);
    let inner = if random.below(2) == 0 { text } else { "" };
    let nest = format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
    if random.below(2) == 0 { nest } else { text.replacen(':', &format!(":{nest},\"y\":"), 1) }
}

fn of_lines(random: &mut Random, text: &[u8]) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let at = random.below(lines.len());
    let from = random.below(lines.len());
    match random.below(4) {
        0 => {
            let copy = lines[from].clone();
            lines[at] = copy;
        }
        1 => lines.insert(at, lines[from].clone()),
        _ => lines[at] = of_json(random, &lines[at]),
    }
    lines.join(&b'\n')
}

fn of_header(random: &mut Random, file: &[u8]) -> Vec<u8> {
    let split = file.split_first_chunk::<8>();
    let parts = split.and_then(|(length, rest)| {
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        rest.split_at_checked(length)
    });
    let Some((header, values)) = parts else { return file.to_vec() };
    let header = of_json(random, header);
    let length = if random.below(4) == 0 { random.number() } else { header.len() as u64 };
    [&length.to_le_bytes(), &header[..], values].concat()
}

/// Replaces, removes or adds something below `value`.
fn change(random: &mut Random, value: &mut Value, donor: &Value) {
    let down = random.below(8) > 0;
    match value {
        Value::Object(map) if down && !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
            match random.below(12) {
                0 => drop(map.shift_remove(&key)),
                1 => {
                    let value = map.shift_remove(&key).unwrap_or_default();
                    map.insert((*random.pick(&TEXTS)).to_owned(), value);
                }
                2 => drop(map.insert((*random.pick(&TEXTS)).to_owned(), forged(random, donor))),
                _ => {
                    if let Some(inner) = map.get_mut(&key) {
                        change(random, inner, donor);
                    }
                }
            }
        }
        Value::Array(list) if down && !list.is_empty() => {
            let at = random.below(list.len());
            match random.below(8) {
                0 => drop(list.remove(at)),
                1 => list.insert(at, forged(random, donor)),
                2 => {
                    let copy = list[at].clone();
                    list.extend(std::iter::repeat_n(copy, 1 << random.below(8)));
                }
                _ => change(random, &mut list[at], donor),
            }
        }
        Value::String(text) if down => match random.below(4) {
            0 => text.push_str(random.pick::<&str>(&TEXTS)),
            1 => *text = text.repeat(1 << random.below(8)),
            2 => text.truncate(text.char_indices().nth(random.below(8)).map_or(0, |(at, _)| at)),
            _ => *value = forged(random, donor),
        },
        _ => *value = forged(random, donor),
    }
}

/// A value of any kind.
fn forged(random: &mut Random, donor: &Value) -> Value {
    match random.below(12) {
        0 => Value::Null,
        1 => Value::Bool(random.below(2) == 0),
        2 | 3 => random.number().into(),
        4 => random.number().cast_signed().wrapping_neg().into(),
        5 => f64::from_bits(random.next()).into(),
        6 => (*random.pick(&[0.5, -1.5, 1e300, 1e-300, 1e18])).into(),
        7 => (*random.pick(&TEXTS)).into(),
        8 => Value::Array(Vec::new()),
        9 => Value::Object(Map::new()),
        _ => part_of(random, donor).clone(),
    }
}

/// Something below `value`, wherever.
fn part_of<'a>(random: &mut Random, value: &'a Value) -> &'a Value {
    let inner = match value {
        Value::Object(map) => map.values().nth(random.below(map.len())),
        Value::Array(list) => list.get(random.below(list.len())),
        _ => None,
    };
    match inner {
        Some(inner) if random.below(3) > 0 => part_of(random, inner),
        _ => value,
    }
}

/// Another word in place of one, or a number that cannot be.
fn of_text(random: &mut Random, file: &mut Vec<u8>) {
    let word = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-+\"".contains(byte);
    let mut words = Vec::new();
    let mut start = None;
    for (at, byte) in file.iter().chain([&b'\n']).enumerate() {
        match (start, word(byte)) {
            (None, true) => start = Some(at),
            (Some(from), false) => {
                words.push(from..at);
                start = None;
            }
            _ => {}
        }
    }
    if words.is_empty() {
        return;
    }
    let (at, from) = (random.pick(&words).clone(), random.pick(&words).clone());
    let new = match random.below(8) {
        0 => random.number().to_string(),
        1 => format!("-{}", random.number()),
        2 => format!("{:e}", f64::from_bits(random.next())),
        3 => format!("{:?}", random.pick(&TEXTS)),
        4 => {
            let depth = 1 << random.below(16);
            format!("{}{}", "[".repeat(depth), "]".repeat(depth))
        }
        5 => String::new(),
        _ => String::from_utf8_lossy(&file[from]).into_owned(),
    };
    file.splice(at, new.into_bytes());
}
