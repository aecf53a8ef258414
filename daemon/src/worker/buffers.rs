//! Buffers that the kernel picks by itself for multishot receives: a ring of them, shared with it.
//!
//! Source: io_uring_register_buf_ring(3), io_uring/kbuf.c.

use io_uring::{Submitter, types::BufRingEntry};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    io,
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU16, Ordering},
};

/// How many: they are given back at once, so that only what comes in one batch needs as many. Without one a receive
/// ends, and the connection goes on with its own buffer. Few, as the kernel takes them in turn and they shall stay in
/// the cache; in tests so few that they run out.
const COUNT: u16 = if cfg!(test) { 4 } else { 256 };

/// Bytes of each: a browser's preflight is about 600.
const SIZE: usize = 2048;

/// The ring is memory that the kernel maps: whole pages.
const PAGE: usize = 4096;

/// The group's number in its io_uring.
pub(super) const GROUP: u16 = 0;

/// The ring of buffers. Must not be dropped while the kernel may still write: after the last receive has ended.
#[derive(Debug)]
pub(super) struct Buffers {
    ring: NonNull<BufRingEntry>,
    bytes: NonNull<u8>,
    tail: u16,
}

impl Buffers {
    /// Makes the buffers and hands them to the kernel.
    ///
    /// # Errors
    /// The kernel's, where it has no rings of buffers (before Linux 5.19).
    pub(super) fn register(submitter: &Submitter<'_>) -> io::Result<Self> {
        let mut buffers =
            Self { ring: allocate(ring_layout()).cast(), bytes: allocate(bytes_layout()), tail: 0 };
        // SAFETY: the ring has COUNT entries in zeroed pages of its own, which live until after the last receive.
        unsafe {
            submitter.register_buf_ring_with_flags(buffers.ring.as_ptr() as u64, COUNT, GROUP, 0)?;
        }
        for id in 0..COUNT {
            buffers.give_back(id);
        }
        Ok(buffers)
    }

    /// What the kernel has written into a buffer that it has handed over and did not get back yet; nothing if it
    /// has no such buffer.
    pub(super) fn bytes(&self, id: u16, len: usize) -> &[u8] {
        if id >= COUNT {
            return &[];
        }
        // SAFETY: within the allocation, which was zeroed first; the kernel does not write into a buffer that is not in
        // the ring, and `give_back` takes `&mut self`.
        unsafe {
            let begin = self.bytes.as_ptr().add(usize::from(id) * SIZE);
            slice::from_raw_parts(begin, len.min(SIZE))
        }
    }

    /// The kernel may have it again.
    pub(super) fn give_back(&mut self, id: u16) {
        if id >= COUNT {
            return;
        }
        // SAFETY: the position is within the ring, and the kernel reads entries below the tail only. `tail` lies in the
        // first entry, where nothing but the kernel's reader looks at it.
        unsafe {
            let entry = self.ring.as_ptr().add(usize::from(self.tail % COUNT));
            (*entry).set_addr(self.bytes.as_ptr().add(usize::from(id) * SIZE) as u64);
            (*entry).set_len(SIZE as u32);
            (*entry).set_bid(id);
            self.tail = self.tail.wrapping_add(1);
            let tail = BufRingEntry::tail(self.ring.as_ptr()).cast_mut();
            AtomicU16::from_ptr(tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated with these layouts; the kernel holds its own reference to the ring's pages, and no receive
        // is left that could write into the buffers.
        unsafe {
            dealloc(self.ring.as_ptr().cast(), ring_layout());
            dealloc(self.bytes.as_ptr(), bytes_layout());
        }
    }
}

fn allocate(layout: Layout) -> NonNull<u8> {
    // SAFETY: no layout here is empty.
    NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

const fn layout(size: usize) -> Layout {
    match Layout::from_size_align(size.next_multiple_of(PAGE), PAGE) {
        Ok(layout) => layout,
        Err(_) => panic!("a power of two, and small"),
    }
}

const fn ring_layout() -> Layout {
    layout(COUNT as usize * size_of::<BufRingEntry>())
}

const fn bytes_layout() -> Layout {
    layout(COUNT as usize * SIZE)
}

const _: () = assert!(COUNT.is_power_of_two() && size_of::<BufRingEntry>() == 16);
