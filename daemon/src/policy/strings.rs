//! Immutable sets of byte strings in one arena: few are compared one by one, many are hashed.

use ahash::RandomState;
use hashbrown::HashTable;
use std::sync::LazyLock;

/// Up to this many strings are compared one by one: the length alone tells most of them apart.
const LINEAR: usize = 8;

/// Keys are hashed with a seed of this process, so that nobody can prepare collisions.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Hash of `key` together with a number that tells tables within a table apart.
pub(super) fn hash(salt: u64, key: &[u8]) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = HASHER.build_hasher();
    hasher.write_u64(salt);
    hasher.write(key);
    hasher.finish()
}

/// Distinct byte strings, each known by its position.
#[derive(Debug, Default)]
pub(super) struct Strings {
    bytes: Box<[u8]>,
    ends: Box<[u32]>,
    index: Option<HashTable<u32>>,
}

impl Strings {
    /// Keeps the order of `items`. Of equal items the first is the one that is found.
    pub(super) fn new<T: AsRef<[u8]>>(items: impl IntoIterator<Item = T>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for item in items {
            bytes.extend_from_slice(item.as_ref());
            ends.push(bytes.len() as u32);
        }
        let mut set = Self { bytes: bytes.into(), ends: ends.into(), index: None };
        if set.len() > LINEAR {
            let mut index = HashTable::with_capacity(set.len());
            for i in 0..set.len() as u32 {
                let key = set.get(i);
                index.entry(hash(0, key), |&j| set.get(j) == key, |&j| hash(0, set.get(j))).or_insert(i);
            }
            set.index = Some(index);
        }
        set
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// None at all.
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at a position.
    pub(super) fn get(&self, i: u32) -> &[u8] {
        let start = if i == 0 { 0 } else { self.ends[i as usize - 1] };
        &self.bytes[start as usize..self.ends[i as usize] as usize]
    }

    /// All, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len() as u32).map(|i| self.get(i))
    }

    /// Position of `key`.
    #[inline]
    pub(super) fn find(&self, key: &[u8]) -> Option<u32> {
        match &self.index {
            Some(index) => index.find(hash(0, key), |&i| self.get(i) == key).copied(),
            None => {
                let mut start = 0;
                for (i, &end) in self.ends.iter().enumerate() {
                    if (end - start) as usize == key.len() && &self.bytes[start as usize..end as usize] == key
                    {
                        return Some(i as u32);
                    }
                    start = end;
                }
                None
            }
        }
    }

    /// Whether `key` is one of them.
    #[inline]
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.find(key).is_some()
    }
}

/// Which lengths from 0 to 511 occur: spares the hash of a key that cannot be there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lengths([u64; 8]);

impl Lengths {
    /// The lengths of these strings; longer ones than 511 must not be asked for.
    pub(super) fn of<'a>(items: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut lengths = Self::default();
        for item in items {
            if item.len() < 512 {
                lengths.0[item.len() / 64] |= 1 << (item.len() % 64);
            }
        }
        lengths
    }

    /// Whether a string of this length is there.
    #[inline]
    pub(super) fn has(&self, len: usize) -> bool {
        len < 512 && self.0[len / 64] & (1 << (len % 64)) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_by_position_few_and_many() {
        for n in [0_u32, 1, 8, 9, 500] {
            let items: Vec<String> = (0..n).map(|i| format!("item-{i}")).collect();
            let set = Strings::new(&items);
            assert_eq!(set.len(), n as usize);
            for (i, item) in items.iter().enumerate() {
                assert_eq!(set.find(item.as_bytes()), Some(i as u32), "{item} of {n}");
            }
            for absent in ["", "item-", "item-500x", "ITEM-1"] {
                assert_eq!(set.find(absent.as_bytes()), None, "{absent} of {n}");
            }
            assert_eq!(set.iter().count(), n as usize);
        }
        assert_eq!(Strings::new(["a", "b", "a"]).find(b"a"), Some(0));
    }

    #[test]
    fn knows_lengths() {
        let lengths = Lengths::of([b"".as_slice(), &[b'a'; 63], &[b'a'; 64], &[b'a'; 511], &[b'a'; 512]]);
        let has: Vec<usize> = (0..600).filter(|&n| lengths.has(n)).collect();
        assert_eq!(has, [0, 63, 64, 511]);
    }
}
