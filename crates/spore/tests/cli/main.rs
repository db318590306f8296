//! The CLI as a person or a program sees it, against a fake daemon: words, shapes and exit codes.
//!
//! What is printed is compared with `golden/*.txt`; `SPORE_GOLDEN=write cargo test -p spore --test
//! cli` writes them anew, and the difference is reviewed like code.

#[cfg(test)]
mod fake;

#[cfg(test)]
mod tests;
