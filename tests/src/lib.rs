//! The test lab.

pub mod smuggling;
