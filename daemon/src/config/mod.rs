//! TOML to validated types.
