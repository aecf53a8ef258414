//! Immutable sets of byte strings, laid out for few cache misses: one block of memory, in which the strings lie one after
//! the other behind their lengths; few are compared in turn, many are found by an open-addressed index before them, with
//! a piece of the hash in each slot.

use ahash::RandomState;
use std::sync::{Arc, LazyLock};

/// Up to this many strings are compared one by one: the length alone tells most of them apart.
const LINEAR: usize = 4;

/// Bytes before each string: its length and its position.
const HEADER: usize = 6;

/// Keys are hashed with a seed of this process, so that nobody can prepare collisions.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Hash of `key` together with a number that tells tables within a table apart.
#[inline]
pub(super) fn hash(salt: u64, key: &[u8]) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = HASHER.build_hasher();
    hasher.write_u64(salt);
    hasher.write(key);
    hasher.finish()
}

/// How many slots of an open-addressed index are for so many items: at most two thirds are taken.
fn slots_for(items: usize) -> usize {
    (items + items / 2 + 1).next_power_of_two()
}

/// The number in a slot that is not taken.
const FREE: u32 = u32::MAX;

/// The piece of a hash that is kept in a slot.
#[inline]
fn tag(hash: u64) -> u32 {
    (hash >> 32) as u32
}

/// Numbers by hash: open addressing.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Index {
    /// A piece of the hash and the number; [`FREE`] as number where there is none.
    slots: Box<[(u32, u32)]>,
}

impl Index {
    /// Of `(hash, number)` pairs.
    pub(super) fn new(items: &[(u64, u32)]) -> Self {
        if items.is_empty() {
            return Self::default();
        }
        let mut slots = vec![(0, FREE); slots_for(items.len())];
        let mask = slots.len() - 1;
        for &(hash, number) in items {
            let mut at = hash as usize & mask;
            while slots[at].1 != FREE {
                at = (at + 1) & mask;
            }
            slots[at] = (tag(hash), number);
        }
        Self { slots: slots.into() }
    }

    /// The first number under this hash that `is` it.
    #[inline]
    pub(super) fn find(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = hash as usize & mask;
        loop {
            let (piece, number) = *self.slots.get(at)?;
            if number == FREE {
                return None;
            }
            if piece == tag(hash) && is(number) {
                return Some(number);
            }
            at = (at + 1) & mask;
        }
    }
}

/// Byte strings, each known by its position; clones share them. Ones longer than 65,535 bytes are left out: nothing so long is ever looked
/// for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Strings {
    /// The slots of the index: a piece of the hash (u32), offset of a record or [`FREE`] (u32). Then the records: length
    /// (u16), position (u32), bytes.
    block: Arc<[u8]>,
    /// None where there are few.
    slots: u32,
    count: u32,
}

const SLOT: usize = 8;

impl Strings {
    /// Of equal items the first is the one that is found.
    pub(super) fn new<T: AsRef<[u8]>>(items: impl IntoIterator<Item = T>) -> Self {
        let (mut records, mut offsets) = (Vec::new(), Vec::new());
        let mut count = 0;
        for (i, item) in items.into_iter().enumerate() {
            let item = item.as_ref();
            count = i as u32 + 1;
            if let Ok(len) = u16::try_from(item.len()) {
                offsets.push((hash(0, item), records.len() as u32));
                records.extend_from_slice(&len.to_le_bytes());
                records.extend_from_slice(&(i as u32).to_le_bytes());
                records.extend_from_slice(item);
            }
        }
        if offsets.len() <= LINEAR {
            return Self { block: records.into(), slots: 0, count };
        }
        let index = Index::new(&offsets);
        let slots = index.slots.len();
        let mut block = Vec::with_capacity(slots * SLOT + records.len());
        for &(tag, offset) in &index.slots {
            let offset = if offset == FREE { FREE } else { (slots * SLOT) as u32 + offset };
            block.extend_from_slice(&tag.to_le_bytes());
            block.extend_from_slice(&offset.to_le_bytes());
        }
        block.append(&mut records);
        Self { block: block.into(), slots: slots as u32, count }
    }

    /// None at all.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count as usize
    }

    /// All, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.records().map(|(_, text)| text)
    }

    /// Position of `key`.
    #[inline]
    pub(super) fn find(&self, key: &[u8]) -> Option<u32> {
        let Some(mask) = self.slots.checked_sub(1) else {
            return self.records().find(|(_, text)| *text == key).map(|(position, _)| position);
        };
        let hash = hash(0, key);
        let mut at = hash as u32 & mask;
        loop {
            let slot = self.block.get(at as usize * SLOT..)?.first_chunk::<SLOT>()?;
            let [t0, t1, t2, t3, o0, o1, o2, o3] = *slot;
            let offset = u32::from_le_bytes([o0, o1, o2, o3]);
            if offset == FREE {
                return None;
            }
            if u32::from_le_bytes([t0, t1, t2, t3]) == tag(hash)
                && let Some((position, text)) = self.record(offset as usize)
                && text == key
            {
                return Some(position);
            }
            at = (at + 1) & mask;
        }
    }

    /// Whether `key` is one of them.
    #[inline]
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.find(key).is_some()
    }

    /// Position and bytes of each record.
    #[inline]
    fn records(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let mut offset = self.slots as usize * SLOT;
        std::iter::from_fn(move || {
            let (position, text) = self.record(offset)?;
            offset += HEADER + text.len();
            Some((position, text))
        })
    }

    /// Position and bytes of the record at an offset; `None` behind the last.
    #[inline]
    fn record(&self, offset: usize) -> Option<(u32, &[u8])> {
        let (header, rest) = self.block.get(offset..)?.split_first_chunk::<HEADER>()?;
        let [l0, l1, p0, p1, p2, p3] = *header;
        let text = rest.get(..usize::from(u16::from_le_bytes([l0, l1])))?;
        Some((u32::from_le_bytes([p0, p1, p2, p3]), text))
    }
}

/// Which lengths from 0 to 511 occur: spares the hash of a key that cannot be there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
        for n in [0_u32, 1, 4, 5, 500] {
            let items: Vec<String> = (0..n).map(|i| format!("item-{i}")).collect();
            let set = Strings::new(&items);
            for (i, item) in items.iter().enumerate() {
                assert_eq!(set.find(item.as_bytes()), Some(i as u32), "{item} of {n}");
            }
            for absent in ["", "item-", "item-500x", "ITEM-1"] {
                assert_eq!(set.find(absent.as_bytes()), None, "{absent} of {n}");
            }
            assert_eq!(set.iter().count(), n as usize);
        }
        assert_eq!(Strings::new(["a", "b", "a"]).find(b"a"), Some(0));
        assert_eq!(Strings::new(["a", "b", "a", "c", "d"]).find(b"a"), Some(0));
        let long = vec![b'x'; 70_000];
        let set = Strings::new([b"a".as_slice(), &long, b""]);
        assert_eq!((set.find(&long), set.find(b""), set.find(b"a")), (None, Some(2), Some(0)));
    }

    #[test]
    fn knows_lengths() {
        let lengths = Lengths::of([b"".as_slice(), &[b'a'; 63], &[b'a'; 64], &[b'a'; 511], &[b'a'; 512]]);
        let has: Vec<usize> = (0..600).filter(|&n| lengths.has(n)).collect();
        assert_eq!(has, [0, 63, 64, 511]);
    }
}
