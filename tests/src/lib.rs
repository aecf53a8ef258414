//! The test lab.

pub mod netns;
pub mod smuggling;
