//! Hostile `Access-Control-Request-Headers` values, of the kinds that have cost other implementations their time.
#![forbid(unsafe_code)]

/// Each kind by its name, `length` bytes long. `known` is a header that the policy allows.
pub fn hostile(known: &str, length: usize) -> Vec<(&'static str, Vec<u8>)> {
    let fill = |unit: &str| unit.bytes().cycle().take(length).collect::<Vec<u8>>();
    let numbered: Vec<_> = (0..length).map(|number| format!("x-{number},")).collect();
    vec![
        ("only commas", fill(",")),
        ("only blanks", fill(" ")),
        ("empty elements", fill(" ,\t")),
        ("one-letter names", fill("a,")),
        ("one long name", fill("a")),
        ("one allowed name over and over", fill(&format!("{known},"))),
        ("nearly an allowed name", fill(&format!("{}!,", &known[..known.len() - 1]))),
        ("different names", numbered.concat().into_bytes()[..length].to_vec()),
        ("an invalid byte at the end", {
            let mut value = fill(&format!("{known},"));
            value[length - 1] = 0x01;
            value
        }),
    ]
}
