//! Inputs for the fuzz targets: something good with changes, so that a fuzzer without a corpus is at work from its first
//! run.
#![forbid(unsafe_code)]

use libfuzzer_sys::arbitrary::{self, Arbitrary};

/// Changes, one after the other.
#[derive(Arbitrary, Debug)]
pub struct Edits<'a>(Vec<Edit<'a>>);

#[derive(Arbitrary, Debug)]
struct Edit<'a> {
    at: u16,
    remove: u16,
    insert: Insert<'a>,
}

#[derive(Arbitrary, Debug)]
enum Insert<'a> {
    Word(u8),
    Bytes(&'a [u8]),
    Copy { from: u16, len: u8, times: u8 },
}

impl Edits<'_> {
    /// Makes the changes to `base`; `words` are what is often worth inserting.
    pub fn apply(&self, base: &[u8], words: &[&str]) -> Vec<u8> {
        let mut text = base.to_vec();
        for edit in &self.0 {
            let at = usize::from(edit.at) % (text.len() + 1);
            // Mostly small: every 16th removes as much as it says.
            let remove =
                usize::from(if edit.remove % 16 == 0 { edit.remove / 16 } else { edit.remove % 16 - 1 });
            let end = (at + remove).min(text.len());
            let insert = match edit.insert {
                Insert::Word(i) => words[usize::from(i) % words.len()].as_bytes().to_vec(),
                Insert::Bytes(bytes) => bytes.to_vec(),
                Insert::Copy { from, len, times } => {
                    let from = usize::from(from) % (text.len() + 1);
                    text[from..text.len().min(from + usize::from(len))].repeat(usize::from(times % 80))
                }
            };
            text.splice(at..end, insert);
        }
        text
    }
}
