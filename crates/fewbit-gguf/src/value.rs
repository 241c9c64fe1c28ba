//! The values of a GGUF file's metadata.

/// What kind a [`Value`] is; the numbers in a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ValueKind {
    /// An unsigned integer of 8 bits.
    U8 = 0,
    /// A signed integer of 8 bits.
    I8 = 1,
    /// An unsigned integer of 16 bits.
    U16 = 2,
    /// A signed integer of 16 bits.
    I16 = 3,
    /// An unsigned integer of 32 bits.
    U32 = 4,
    /// A signed integer of 32 bits.
    I32 = 5,
    /// A float of 32 bits.
    F32 = 6,
    /// A truth value.
    Bool = 7,
    /// A string.
    Text = 8,
    /// Values of one kind.
    List = 9,
    /// An unsigned integer of 64 bits.
    U64 = 10,
    /// A signed integer of 64 bits.
    I64 = 11,
    /// A float of 64 bits.
    F64 = 12,
}

impl ValueKind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::List,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// The kind of a number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == id)
    }

    /// The fewest bytes that a value of this kind takes in a file.
    pub(crate) fn least_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::Text | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::List => 12,
        }
    }
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer of 8 bits.
    U8(u8),
    /// A signed integer of 8 bits.
    I8(i8),
    /// An unsigned integer of 16 bits.
    U16(u16),
    /// A signed integer of 16 bits.
    I16(i16),
    /// An unsigned integer of 32 bits.
    U32(u32),
    /// A signed integer of 32 bits.
    I32(i32),
    /// A float of 32 bits.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// A string.
    Text(String),
    /// Values of one kind; the kind is stored also when there are none.
    List(ValueKind, Vec<Self>),
    /// An unsigned integer of 64 bits.
    U64(u64),
    /// A signed integer of 64 bits.
    I64(i64),
    /// A float of 64 bits.
    F64(f64),
}

impl Value {
    /// A list of strings.
    pub fn texts(values: impl IntoIterator<Item = String>) -> Self {
        Self::List(ValueKind::Text, values.into_iter().map(Self::Text).collect())
    }

    /// A list of f32.
    pub fn floats(values: impl IntoIterator<Item = f32>) -> Self {
        Self::List(ValueKind::F32, values.into_iter().map(Self::F32).collect())
    }

    /// A list of i32.
    pub fn integers(values: impl IntoIterator<Item = i32>) -> Self {
        Self::List(ValueKind::I32, values.into_iter().map(Self::I32).collect())
    }

    /// Its kind.
    pub fn kind(&self) -> ValueKind {
        match self {
            Self::U8(_) => ValueKind::U8,
            Self::I8(_) => ValueKind::I8,
            Self::U16(_) => ValueKind::U16,
            Self::I16(_) => ValueKind::I16,
            Self::U32(_) => ValueKind::U32,
            Self::I32(_) => ValueKind::I32,
            Self::F32(_) => ValueKind::F32,
            Self::Bool(_) => ValueKind::Bool,
            Self::Text(_) => ValueKind::Text,
            Self::List(..) => ValueKind::List,
            Self::U64(_) => ValueKind::U64,
            Self::I64(_) => ValueKind::I64,
            Self::F64(_) => ValueKind::F64,
        }
    }

    /// The number, when it is a whole one and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The text of a string.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The values of a list.
    pub fn as_list(&self) -> Option<&[Self]> {
        match self {
            Self::List(_, values) => Some(values),
            _ => None,
        }
    }

    /// Whether every list in it holds values of its one kind.
    pub(crate) fn is_sound(&self) -> bool {
        match self {
            Self::List(kind, values) => {
                values.iter().all(|value| value.kind() == *kind && value.is_sound())
            }
            _ => true,
        }
    }

    /// Appends the value, without its kind.
    pub(crate) fn push_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(value) => out.push(*value),
            Self::I8(value) => out.push(value.cast_unsigned()),
            Self::U16(value) => out.extend(value.to_le_bytes()),
            Self::I16(value) => out.extend(value.to_le_bytes()),
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::I32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Bool(value) => out.push((*value).into()),
            Self::Text(text) => push_text(text, out),
            Self::List(kind, values) => {
                out.extend((*kind as u32).to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                for value in values {
                    value.push_to(out);
                }
            }
            Self::U64(value) => out.extend(value.to_le_bytes()),
            Self::I64(value) => out.extend(value.to_le_bytes()),
            Self::F64(value) => out.extend(value.to_le_bytes()),
        }
    }
}

/// Appends a string as files store it: its length in bytes, then UTF-8.
pub(crate) fn push_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_values() {
        let bytes = |value: &Value| {
            let mut out = Vec::new();
            value.push_to(&mut out);
            out
        };
        assert_eq!(bytes(&Value::Bool(true)), [1]);
        assert_eq!(bytes(&Value::I16(-2)), [0xfe, 0xff]);
        assert_eq!(bytes(&"ab".into()), [2, 0, 0, 0, 0, 0, 0, 0, b'a', b'b']);
        assert_eq!(bytes(&Value::integers([7])), [5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn kinds_and_readings() {
        for kind in ValueKind::ALL {
            assert_eq!(ValueKind::from_id(kind as u32), Some(kind));
        }
        assert_eq!(ValueKind::from_id(13), None);
        assert_eq!(Value::I8(-1).as_u64(), None);
        assert_eq!(Value::U16(9).as_u64(), Some(9));
        assert_eq!(Value::from("x").as_text(), Some("x"));
        assert!(!Value::List(ValueKind::U8, vec![Value::Bool(true)]).is_sound());
        assert!(Value::floats([1.0]).is_sound());
    }
}
