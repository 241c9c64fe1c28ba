//! JSON schemas of values that a recipe writes in a way of its own.

/// Says what JSON a type is read from, where its `Deserialize` is written by hand.
macro_rules! schema_of {
    ($type:ident, $about:literal, $schema:tt) => {
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                let mut schema = schemars::json_schema!($schema);
                schema.insert("description".to_owned(), $about.into());
                schema
            }
        }
    };
}
pub(crate) use schema_of;
