//! Why a request was not answered here: one named variant for each cause, shared by every tier.
#![forbid(unsafe_code)]

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// Why a request goes to the proxy untouched. [`PassReason::as_str`] is the metric label and the word in
        /// `explain`: stable, never renamed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum PassReason { $($(#[$doc])* $variant,)+ }

        impl PassReason {
            /// Every reason, in order of its discriminant.
            pub const ALL: &'static [PassReason] = &[$(PassReason::$variant,)+];

            /// The stable name, in snake case.
            pub const fn as_str(self) -> &'static str {
                match self { $(PassReason::$variant => $name,)+ }
            }

            /// Position in [`PassReason::ALL`].
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

reasons! {
    // What the head said (`http`).
    /// The method is not byte-exactly `OPTIONS`.
    NotOptions = "not_options",
    /// The head is not well-formed HTTP/1 (RFC 9112 §2-§5), so proxies may read it differently.
    MalformedHead = "malformed_head",
    /// A line ended in a bare LF (RFC 9112 §2.2).
    BareLf = "bare_lf",
    /// A folded header line (RFC 9112 §5.2).
    ObsFold = "obs_fold",
    /// The head is longer than `limits.max_head_bytes`, or has too many header lines.
    HeadTooLarge = "head_too_large",
    /// HTTP version other than 1.0 and 1.1.
    Version = "version",
    /// The connection ended before the head did.
    Truncated = "truncated",
    /// Target is `*`.
    AsteriskForm = "asterisk_form",
    /// Target is in absolute or authority form.
    AbsoluteForm = "absolute_form",
    /// Target holds bytes that no URL path or query has (fragment, controls, non-ASCII).
    BadTarget = "bad_target",
    /// The path has dot segments, empty segments, a backslash or a `;`: proxies normalise it differently.
    AmbiguousPath = "ambiguous_path",
    /// The path is percent-encoded: proxies route it before or after decoding.
    EncodedPath = "encoded_path",
    /// No `Origin`: an OPTIONS, not a preflight.
    NoOrigin = "no_origin",
    /// More than one `Origin` line, or an empty one.
    BadOrigin = "bad_origin",
    /// No `Access-Control-Request-Method`: an OPTIONS, not a preflight.
    NoRequestMethod = "no_request_method",
    /// `Access-Control-Request-Method` repeated, empty or not a token.
    BadRequestMethod = "bad_request_method",
    /// No `Host`, or more than one.
    BadHost = "bad_host",
    /// A body: Content-Length above 0 or repeated, or Transfer-Encoding.
    Body = "body",
    /// `Upgrade`, `Expect`, or a `Connection` that names other headers.
    HopByHop = "hop_by_hop",
    /// A header that claims another method or target than the request line (`X-HTTP-Method-Override`, `X-Original-URL`,
    /// …), or one that matters here with `_` for `-` in its name (some proxies drop it, some read both alike).
    AmbiguousHeader = "ambiguous_header",
    /// Cookie or Authorization: no browser sends one on a preflight (Fetch §4.8).
    Credentials = "credentials",
    // What the policy table said (`policy`).
    /// Host is an IP literal that is not ours, has userinfo, a trailing dot, a bad or foreign port, or bad characters.
    ForeignHost = "foreign_host",
    /// No policy for this host on this listener.
    NoHost = "no_host",
    /// No policy for this path of the host.
    NoRoute = "no_route",
    /// Several policies of equal right claim this request.
    Conflict = "conflict",
    /// The route has no CORS policy: the application behind the proxy answers.
    NoCors = "no_cors",
    /// The policy is switched off.
    Disabled = "disabled",
    /// The policy has a part that cannot be modelled exactly.
    Unsupported = "unsupported",
    /// The policy's source was unreachable for too long.
    Stale = "stale",
    /// The policy passes unmatched origins to the proxy (`on_denied = "pass"`).
    OriginNotAllowed = "origin_not_allowed",
    /// The policy passes unlisted methods to the proxy (`on_denied = "pass"`).
    MethodNotAllowed = "method_not_allowed",
    /// The policy passes unlisted headers to the proxy (`on_denied = "pass"`).
    HeadersNotAllowed = "headers_not_allowed",
    /// `Access-Control-Request-Headers` cannot be echoed: not a list of tokens, too long, or too many lines.
    UnusableRequestHeaders = "unusable_request_headers",
    /// Answers are learned of this host, and none to exactly this preflight is known, or holds any more.
    NotLearned = "not_learned",
    // What the worker said.
    /// In shadow mode the proxy answers everything.
    Shadow = "shadow",
    /// The daemon is shutting down and the connection had begun another request.
    Draining = "draining",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_indexed() {
        let mut names: Vec<_> = PassReason::ALL.iter().map(|r| r.as_str()).collect();
        for (i, r) in PassReason::ALL.iter().enumerate() {
            assert_eq!(r.index(), i, "{}", r.as_str());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PassReason::ALL.len());
    }
}
