//! What the proxy answered when it was asked: for how long it holds, and what is never learned.
//!
//! A question is asked twice, a moment apart and on two connections, before its answer is used; two different answers
//! are no answer. Whatever becomes of a question is kept for a while, so that it is not asked again and again; all of it
//! within a bound.
#![forbid(unsafe_code)]

use super::exchange::Reply;
use crate::policy::learned::{Answers, Learnable, Learned, Question};
use ahash::AHashMap;
use serde_json::json;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Between the two asks of a question.
pub(super) const AGAIN: Duration = Duration::from_millis(250);
/// A browser remembers for so long what says nothing of it (Fetch §4.8, "cache entry").
const UNSAID: Duration = Duration::from_secs(5);
/// What holds for less is not worth two questions.
const SHORTEST: Duration = Duration::from_secs(2);
/// An answer leaves the table so long before its end: bringing tables to all tiers takes its time.
const AHEAD: Duration = Duration::from_millis(700);
/// What may not be learned is asked again after this.
const REFUSED: Duration = Duration::from_secs(30);
/// What could not be asked.
const UNREACHABLE: Duration = Duration::from_secs(5);
/// What was answered in two ways.
const CONFLICTING: Duration = Duration::from_mins(10);
/// What an answer may vary by, for it is part of the question.
const ASKED: [&str; 3] = ["origin", "access-control-request-method", "access-control-request-headers"];
/// Bytes of all lines of an answer.
const MAX_LINES: usize = 4096;

macro_rules! refusals {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)+) => {
        /// Why an answer is not learned. The name is a metric label: stable, never renamed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Refusal { $($(#[$doc])* $variant,)+ }

        impl Refusal {
            /// All, in order.
            pub(crate) const ALL: &'static [Refusal] = &[$(Refusal::$variant,)+];

            /// The metric label.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Refusal::$variant => $name,)+ }
            }
        }
    };
}

refusals! {
    /// The proxy could not be asked, or did not answer in time or in HTTP/1.
    Unreachable = "unreachable",
    /// The status is neither 200 nor 204.
    Status = "status",
    /// It sets a cookie.
    SetCookie = "set_cookie",
    /// It has content.
    Body = "body",
    /// It varies by more than what is part of the question.
    Vary = "vary",
    /// No origin is allowed.
    NoOrigin = "no_origin",
    /// A header that may stand once stands twice.
    Repeated = "repeated",
    /// Odd bytes, or too many.
    Odd = "odd",
    /// It holds for too short a time.
    MaxAge = "max_age",
    /// Two asks had different answers.
    Conflict = "conflict",
}

/// What is learned of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    no_content: bool,
    /// `Access-Control-*`, in canonical spelling, as they came.
    lines: Vec<(String, String)>,
    lifetime: Duration,
}

impl Answer {
    /// Judges an answer. `longest`: no answer holds longer.
    pub(super) fn of(reply: &Reply, longest: Duration) -> Result<Self, Refusal> {
        let no_content = match reply.status {
            200 => false,
            204 => true,
            _ => return Err(Refusal::Status),
        };
        if reply.values("set-cookie").next().is_some() {
            return Err(Refusal::SetCookie);
        }
        if reply.content {
            return Err(Refusal::Body);
        }
        let mut varies = reply.values("vary").flat_map(|value| value.split(',')).map(str::trim);
        if !varies.all(|name| name.is_empty() || ASKED.iter().any(|known| known.eq_ignore_ascii_case(name))) {
            return Err(Refusal::Vary);
        }
        let mut lines = Vec::new();
        for (name, value) in &reply.lines {
            if name.len() > 15 && name.as_bytes()[..15].eq_ignore_ascii_case(b"access-control-") {
                lines.push((canonical(name), value.clone()));
            }
        }
        let bytes: usize = lines.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        let plain = |value: &String| value.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        if bytes > MAX_LINES || !lines.iter().all(|(_, value)| plain(value)) {
            return Err(Refusal::Odd);
        }
        for single in
            ["access-control-allow-origin", "access-control-allow-credentials", "access-control-max-age"]
        {
            if reply.values(single).count() > 1 {
                return Err(Refusal::Repeated);
            }
        }
        if !reply.values("access-control-allow-origin").any(|value| !value.is_empty()) {
            return Err(Refusal::NoOrigin);
        }
        let said = reply.values("access-control-max-age").next().map(str::parse::<i64>);
        let lifetime = match said {
            Some(Ok(seconds)) => Duration::from_secs(u64::try_from(seconds).unwrap_or(0)),
            // Not said, or not understood by browsers either.
            Some(Err(_)) | None => UNSAID,
        };
        let lifetime = lifetime.min(longest);
        if lifetime < SHORTEST {
            return Err(Refusal::MaxAge);
        }
        Ok(Self { no_content, lines, lifetime })
    }
}

/// `Access-Control-Allow-Origin` of `access-control-allow-origin`.
fn canonical(name: &str) -> String {
    let mut first = true;
    let mut letter = |c: char| {
        let c = if first { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
        first = c == '-';
        c
    };
    name.chars().map(&mut letter).collect()
}

/// Every question, and what became of it.
#[derive(Debug)]
pub(crate) struct Store {
    learnable: Arc<Learnable>,
    /// Questions at once, whatever became of them.
    max_entries: usize,
    questions: AHashMap<Arc<Question>, Entry>,
    /// Of the newest entry.
    number: u64,
    /// Answers came or went since they were last taken.
    changed: bool,
    /// Answers that were learned.
    learned: u64,
    /// By [`Refusal`].
    refused: [u64; Refusal::ALL.len()],
    evicted: u64,
}

#[derive(Debug)]
struct Entry {
    /// Tells it from an earlier one to the same question.
    number: u64,
    state: State,
    until: Instant,
}

#[derive(Debug)]
enum State {
    /// It is asked, or waits for that. The first answer, and when it was asked for.
    Asked(Option<(Answer, Instant)>),
    Known(Arc<Learned>),
    Refused(Refusal),
}

/// A question that is to be asked.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) question: Arc<Question>,
    number: u64,
}

/// How many questions there are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sizes {
    /// With an answer that holds.
    pub(crate) known: usize,
    /// Being asked.
    pub(crate) asked: usize,
    /// Without one that may be used.
    pub(crate) refused: usize,
}

impl Store {
    pub(super) fn new(learnable: Arc<Learnable>, max_entries: usize) -> Self {
        Self {
            learnable,
            max_entries,
            questions: AHashMap::new(),
            number: 0,
            changed: false,
            learned: 0,
            refused: [0; Refusal::ALL.len()],
            evicted: 0,
        }
    }

    /// A client has asked this. `None`: it need not be asked of the proxy now. The proxy must have been asked by `until`.
    pub(super) fn wanted(&mut self, question: Question, now: Instant, until: Instant) -> Option<Ask> {
        if self.questions.get(&question).is_some_and(|entry| entry.until > now) {
            return None;
        }
        let question = Arc::new(question);
        self.remove(&question);
        while self.questions.len() >= self.max_entries {
            let soonest = self.questions.iter().min_by_key(|(_, entry)| entry.until);
            let soonest = soonest.map(|(question, _)| Arc::clone(question))?;
            self.evicted += 1;
            self.remove(&soonest);
        }
        self.number += 1;
        let entry = Entry { number: self.number, state: State::Asked(None), until };
        self.questions.insert(Arc::clone(&question), entry);
        Some(Ask { question, number: self.number })
    }

    /// The proxy was asked at `asked`. True: it is to be asked once more, after [`AGAIN`].
    pub(super) fn told(
        &mut self,
        ask: &Ask,
        answer: Result<Answer, Refusal>,
        asked: Instant,
        now: Instant,
    ) -> bool {
        let Some(entry) = self.questions.get_mut(&ask.question).filter(|entry| entry.number == ask.number)
        else {
            // Forgotten meanwhile.
            return false;
        };
        let State::Asked(first) = &mut entry.state else { return false };
        let verdict = match (answer, first.take()) {
            (Ok(answer), None) => {
                *first = Some((answer, asked));
                return true;
            }
            (Ok(second), Some((first, asked))) if second == first => {
                entry.until = asked + first.lifetime.saturating_sub(AHEAD);
                Ok(Learned::new(Arc::clone(&ask.question), first.no_content, &first.lines))
            }
            (Err(refusal), first) if first.is_none() || refusal == Refusal::Unreachable => Err(refusal),
            // Also where it could have been learned once, and not the second time.
            _ => Err(Refusal::Conflict),
        };
        match verdict {
            // Too late: as if it had not been asked.
            Ok(_) if entry.until <= now => {
                self.questions.remove(&ask.question);
            }
            Ok(learned) => {
                entry.state = State::Known(Arc::new(learned));
                self.learned += 1;
                self.changed = true;
            }
            Err(refusal) => {
                entry.state = State::Refused(refusal);
                entry.until = now
                    + match refusal {
                        Refusal::Unreachable => UNREACHABLE,
                        Refusal::Conflict => CONFLICTING,
                        _ => REFUSED,
                    };
                self.refused[refusal as usize] += 1;
            }
        }
        false
    }

    /// Forgets what holds no longer, and says when to look again.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Instant> {
        let mut changed = false;
        self.questions.retain(|_, entry| {
            let holds = entry.until > now;
            changed |= !holds && matches!(entry.state, State::Known(_));
            holds
        });
        self.changed |= changed;
        // What is no answer may wait for the next one that is asked for.
        let known = self.questions.values().filter(|entry| matches!(entry.state, State::Known(_)));
        known.map(|entry| entry.until).min()
    }

    /// Forgets all, or all of a host (without port); gives how many.
    pub(crate) fn purge(&mut self, host: Option<&str>) -> usize {
        let goes = |question: &Question| {
            host.is_none_or(|host| question.host_name() == host || *question.host == *host)
        };
        let doomed: Vec<_> = self.questions.keys().filter(|question| goes(question)).cloned().collect();
        for question in &doomed {
            self.remove(question);
        }
        doomed.len()
    }

    /// All answers, if they have changed since the last time.
    pub(super) fn take_changed(&mut self) -> Option<Arc<Answers>> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let known = self.questions.values().filter_map(|entry| match &entry.state {
            State::Known(learned) => Some(Arc::clone(learned)),
            _ => None,
        });
        Some(Arc::new(Answers::new(Arc::clone(&self.learnable), known.collect())))
    }

    /// Whether answers came or went that were not taken yet.
    pub(super) fn is_changed(&self) -> bool {
        self.changed
    }

    /// How many questions there are.
    pub(crate) fn sizes(&self) -> Sizes {
        let mut sizes = Sizes::default();
        for entry in self.questions.values() {
            match entry.state {
                State::Asked(_) => sizes.asked += 1,
                State::Known(_) => sizes.known += 1,
                State::Refused(_) => sizes.refused += 1,
            }
        }
        sizes
    }

    /// Answers that were learned since the start, and entries that had to give way to others.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.learned, self.evicted)
    }

    /// Answers that were not learned, and why.
    pub(crate) fn refusals(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Refusal::ALL.iter().map(|refusal| refusal.as_str()).zip(self.refused)
    }

    /// All questions, or all of a host, for people and scripts.
    pub(crate) fn json(
        &self,
        host: Option<&str>,
        listener: impl Fn(&Question) -> String,
    ) -> serde_json::Value {
        let now = Instant::now();
        let mut all: Vec<_> = self
            .questions
            .iter()
            .filter(|(question, entry)| {
                entry.until > now
                    && host.is_none_or(|host| question.host_name() == host || *question.host == *host)
            })
            .collect();
        all.sort_by(|(a, _), (b, _)| {
            (&a.host, &a.target, &a.origin, &a.method).cmp(&(&b.host, &b.target, &b.origin, &b.method))
        });
        let entries = all.into_iter().map(|(question, entry)| {
            let (state, why) = match entry.state {
                State::Asked(_) => ("asked", None),
                State::Known(_) => ("known", None),
                State::Refused(refusal) => ("refused", Some(refusal.as_str())),
            };
            json!({
                "listener": listener(question),
                "host": question.host,
                "target": question.target,
                "origin": question.origin,
                "method": question.method,
                "headers": question.headers,
                "state": state,
                "why": why,
                "seconds_left": entry.until.saturating_duration_since(now).as_secs(),
            })
        });
        json!({ "entries": entries.collect::<Vec<_>>(), "max_entries": self.max_entries })
    }

    fn remove(&mut self, question: &Arc<Question>) {
        let gone = self.questions.remove(question);
        self.changed |= gone.is_some_and(|entry| matches!(entry.state, State::Known(_)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{HostPattern, ListenerId, RouteLabels};

    const TEN_MINUTES: Duration = Duration::from_mins(10);

    fn reply(status: u16, lines: &[(&str, &str)]) -> Reply {
        let lines = lines.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Reply { status, lines, head: Vec::new(), content: false }
    }

    fn good(max_age: &str) -> Reply {
        reply(
            204,
            &[
                ("X-Powered-By", "Express"),
                ("access-control-allow-origin", "https://a.example"),
                ("Vary", "Origin, access-control-request-headers"),
                ("Access-Control-Max-Age", max_age),
            ],
        )
    }

    fn store(entries: usize) -> Store {
        let hosts = [HostPattern::Exact("h".into())];
        let learnable = Learnable::new(&[], &hosts, &mut RouteLabels::new(4));
        Store::new(Arc::new(learnable), entries)
    }

    fn question(target: &str) -> Question {
        Question {
            listener: ListenerId(0),
            host: "h:8080".into(),
            target: target.into(),
            origin: "https://a.example".into(),
            method: "PUT".into(),
            headers: "".into(),
        }
    }

    #[test]
    fn what_may_be_learned() {
        const ORIGIN: (&str, &str) = ("Access-Control-Allow-Origin", "*");
        let mut with_body = good("60");
        with_body.content = true;
        for (name, reply, expected) in [
            ("content", with_body, Refusal::Body),
            ("not found", reply(404, &[ORIGIN]), Refusal::Status),
            ("redirect", reply(302, &[ORIGIN]), Refusal::Status),
            ("partial content", reply(206, &[ORIGIN]), Refusal::Status),
            ("cookie", reply(204, &[ORIGIN, ("set-cookie", "a=b")]), Refusal::SetCookie),
            ("varies by cookie", reply(204, &[ORIGIN, ("Vary", "Origin, Cookie")]), Refusal::Vary),
            ("varies by all", reply(204, &[ORIGIN, ("Vary", "*")]), Refusal::Vary),
            (
                "varies by language",
                reply(204, &[ORIGIN, ("Vary", "Origin"), ("Vary", "accept-language")]),
                Refusal::Vary,
            ),
            ("no CORS", reply(204, &[("Allow", "GET")]), Refusal::NoOrigin),
            ("no origin", reply(204, &[("Access-Control-Allow-Methods", "PUT")]), Refusal::NoOrigin),
            ("two origins", reply(204, &[ORIGIN, ORIGIN]), Refusal::Repeated),
            ("odd bytes", reply(204, &[ORIGIN, ("Access-Control-Allow-Methods", "P\u{e4}T")]), Refusal::Odd),
            ("not to be remembered", good("0"), Refusal::MaxAge),
            ("never to be remembered", good("-1"), Refusal::MaxAge),
            ("hardly to be remembered", good("1"), Refusal::MaxAge),
        ] {
            assert_eq!(Answer::of(&reply, TEN_MINUTES), Err(expected), "{name}");
        }
        for (max_age, lifetime) in [("60", 60), ("86400", 600), ("nonsense", 5), ("", 5)] {
            let answer = Answer::of(&good(max_age), TEN_MINUTES).expect(max_age);
            assert_eq!(answer.lifetime, Duration::from_secs(lifetime), "{max_age:?}");
        }
        let answer = Answer::of(&good("60"), TEN_MINUTES).expect("good");
        let lines: Vec<_> = answer.lines.iter().map(|(n, v)| (&**n, &**v)).collect();
        let expected =
            [("Access-Control-Allow-Origin", "https://a.example"), ("Access-Control-Max-Age", "60")];
        assert_eq!(lines, expected, "nothing else, in canonical spelling");
    }

    #[test]
    fn an_answer_is_used_when_it_was_given_twice_and_until_its_end() {
        let mut store = store(10);
        let (start, later) = (Instant::now(), Instant::now() + Duration::from_secs(30));
        let ask = store.wanted(question("/"), start, later).expect("not known");
        assert!(store.wanted(question("/"), start, later).is_none(), "it is being asked");
        let answer = || Answer::of(&good("60"), TEN_MINUTES);
        assert!(store.told(&ask, answer(), start, start), "once more");
        assert!(store.take_changed().is_none(), "one answer is none");
        assert!(!store.told(&ask, answer(), start + AGAIN, start + AGAIN));
        assert_eq!(store.take_changed().expect("learned").questions().count(), 1);
        assert!(store.take_changed().is_none());
        let end = store.expire(start).expect("a deadline");
        assert_eq!(end, start + Duration::from_mins(1).saturating_sub(AHEAD), "from when it was first asked");
        assert!(store.wanted(question("/"), start + Duration::from_secs(9), later).is_none());
        assert_eq!(store.expire(end), None);
        assert_eq!(store.take_changed().expect("gone").questions().count(), 0);
        assert!(store.wanted(question("/"), end, end + UNSAID).is_some(), "anew");
    }

    #[test]
    fn two_different_answers_are_none_for_a_while() {
        for (name, second) in [
            ("another answer", Answer::of(&good("61"), TEN_MINUTES)),
            ("none that may be learned", Err(Refusal::SetCookie)),
        ] {
            let mut store = store(10);
            let now = Instant::now();
            let ask = store.wanted(question("/"), now, now + UNSAID).expect("not known");
            assert!(store.told(&ask, Answer::of(&good("60"), TEN_MINUTES), now, now));
            assert!(!store.told(&ask, second, now, now), "{name}");
            assert!(store.take_changed().is_none(), "{name}");
            let refusals: Vec<_> = store.refusals().filter(|(_, count)| *count > 0).collect();
            assert_eq!(refusals, [("conflict", 1)], "{name}");
            let almost = now + CONFLICTING.saturating_sub(UNSAID);
            assert!(store.wanted(question("/"), almost, almost + UNSAID).is_none(), "{name}");
            let end = now + CONFLICTING;
            assert!(store.wanted(question("/"), end, end + UNSAID).is_some(), "{name}");
        }
    }

    #[test]
    fn there_are_never_more_than_fit_and_a_purge_forgets() {
        let mut store = store(3);
        let now = Instant::now();
        for (i, max_age) in ["100", "50", "200", "300"].iter().enumerate() {
            let ask = store.wanted(question(&format!("/{i}")), now, now + UNSAID).expect("not known");
            let answer = Answer::of(&good(max_age), TEN_MINUTES);
            assert!(store.told(&ask, answer.clone(), now, now) && !store.told(&ask, answer, now, now));
            assert!(store.questions.len() <= 3);
        }
        let answers = store.take_changed().expect("learned");
        let mut paths: Vec<_> = answers.questions().map(Question::path).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["/0", "/2", "/3"], "what would end first gave way");
        assert_eq!((store.purge(Some("other")), store.purge(Some("h"))), (0, 3));
        assert_eq!(store.take_changed().expect("gone").questions().count(), 0);

        // What was asked before a purge says nothing after it.
        let ask = store.wanted(question("/"), now, now + UNSAID).expect("not known");
        assert_eq!(store.purge(None), 1);
        assert!(!store.told(&ask, Answer::of(&good("60"), TEN_MINUTES), now, now));
        assert_eq!(store.sizes().known, 0);
    }
}
