//! `Date` (RFC 9110 §6.6.1): an IMF-fixdate, made once a second.

/// The date for seconds since 1970 UTC, such as `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn imf_fixdate(_unix_seconds: u64) -> [u8; 29] {
    todo!()
}
