//! The first-bytes classifier: may a flow that opens with these bytes be a preflight?

/// The only way a preflight can begin (RFC 9112 §3: method, one SP). Methods are case-sensitive.
pub const METHOD: &[u8; 8] = b"OPTIONS ";

/// What the first bytes of a request say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstBytes {
    /// Not `OPTIONS`: never a preflight.
    Other,
    /// A proper prefix of `OPTIONS `, or nothing yet: more bytes decide.
    Undecided,
    /// `OPTIONS `: may be a preflight; the head decides.
    Options,
}

/// Classifies the first bytes of a request. Looks at eight bytes at most.
#[inline]
pub fn classify(bytes: &[u8]) -> FirstBytes {
    let mut i = 0;
    while i < METHOD.len() {
        if i == bytes.len() {
            return FirstBytes::Undecided;
        }
        if bytes[i] != METHOD[i] {
            return FirstBytes::Other;
        }
        i += 1;
    }
    FirstBytes::Options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        for (bytes, want) in [
            (&b""[..], FirstBytes::Undecided),
            (b"O", FirstBytes::Undecided),
            (b"OPTIONS", FirstBytes::Undecided),
            (b"OPTIONS ", FirstBytes::Options),
            (b"OPTIONS /x HTTP/1.1\r\n", FirstBytes::Options),
            (b"options ", FirstBytes::Other),
            (b"OPTIONSX", FirstBytes::Other),
            (b"OPTIONS\t/", FirstBytes::Other),
            (b"GET / ", FirstBytes::Other),
            (b"\r\nOPTIONS ", FirstBytes::Other),
            (b"\x16\x03\x01", FirstBytes::Other),
        ] {
            assert_eq!(classify(bytes), want, "{bytes:?}");
        }
    }
}
