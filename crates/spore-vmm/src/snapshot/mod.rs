//! A saved machine as a file. What is in it is each part's own; here is the form around it.

pub mod format;
