//! `Date` (RFC 9110 §6.6.1): an IMF-fixdate, made once a second.
#![forbid(unsafe_code)]

use httpdate::HttpDate;
use std::{
    io::Write,
    time::{Duration, SystemTime},
};

/// The last second that an IMF-fixdate can say: its year has four digits.
const LAST: u64 = 253_402_300_799;

/// The date for seconds since 1970 UTC, such as `Sun, 06 Nov 1994 08:49:37 GMT`. Clocks beyond the year 9999 get its
/// last second.
pub fn imf_fixdate(unix_seconds: u64) -> [u8; 29] {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(unix_seconds.min(LAST));
    let mut date = [b' '; 29];
    write!(&mut date[..], "{}", HttpDate::from(time)).expect("an IMF-fixdate has 29 bytes");
    date
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, want) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (951_782_400, "Tue, 29 Feb 2000 00:00:00 GMT"),
            (1_709_251_199, "Thu, 29 Feb 2024 23:59:59 GMT"),
            (4_107_542_400, "Mon, 01 Mar 2100 00:00:00 GMT"),
            (LAST, "Fri, 31 Dec 9999 23:59:59 GMT"),
            (u64::MAX, "Fri, 31 Dec 9999 23:59:59 GMT"),
        ] {
            assert_eq!(std::str::from_utf8(&imf_fixdate(seconds)), Ok(want), "{seconds}");
        }
    }
}
