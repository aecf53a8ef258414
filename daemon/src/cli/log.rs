//! `tracing` to standard error, as text or JSON. What comes from the network is escaped in both.

use super::Failure;
use crate::config::{Log, LogFormat, escape};
use std::io;
use tracing_subscriber::{
    EnvFilter,
    field::MakeExt as _,
    fmt::format::{Writer, debug_fn},
};

/// Begins to log. `level` (of the command line) goes before RUST_LOG, which goes before the configuration.
pub(super) fn init(log: &Log, level: Option<&str>) -> Result<(), Failure> {
    let from_env = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
    let filter = level.or(from_env.as_deref()).unwrap_or(&log.level);
    let filter = EnvFilter::try_new(filter).map_err(|e| {
        Failure::Usage(format!("`{filter}` is no log level: {e}; write error, warn, info, debug or trace"))
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match log.format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => {
            let colours = anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never;
            builder.with_ansi(colours).fmt_fields(debug_fn(field).delimited(" ")).init();
        }
    }
    Ok(())
}

/// One field: on one line, and without anything that a terminal acts upon.
fn field(
    writer: &mut Writer<'_>,
    field: &tracing::field::Field,
    value: &dyn std::fmt::Debug,
) -> std::fmt::Result {
    let value = escape(&format!("{value:?}"));
    if field.name() == "message" {
        write!(writer, "{value}")
    } else {
        write!(writer, "{}={value}", field.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("the buffer").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn hostile_values_stay_on_their_line() {
        let hostile = "x\r\n2026-01-01 ERROR forged \u{1b}[31m\u{9b}2J\u{202e}";
        for json in [false, true] {
            let buffer = Buffer::default();
            let writer = buffer.clone();
            let builder = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false);
            let log = || tracing::info!(shown = %hostile, quoted = hostile, debugged = ?hostile, "origin {hostile}");
            if json {
                tracing::subscriber::with_default(builder.json().flatten_event(true).finish(), log);
            } else {
                let fields = debug_fn(field).delimited(" ");
                tracing::subscriber::with_default(builder.fmt_fields(fields).finish(), log);
            }
            let text = String::from_utf8(buffer.0.lock().expect("the buffer").clone()).expect("UTF-8");
            assert_eq!(text.lines().count(), 1, "{text}");
            assert!(!text.trim_end().contains(|c: char| c.is_ascii_control()), "{text:?}");
        }
    }
}
